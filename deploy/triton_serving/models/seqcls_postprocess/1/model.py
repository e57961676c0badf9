"""Logits to label names and probabilities; the same decision as metric.decode.

Reads settings.json beside it, which make_repository.py wrote from the bundle.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(pb_utils.get_model_dir(), "settings.json")
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        self.labels = settings["labels"]
        self.thresholds = np.array(settings["thresholds"], dtype=np.float32)
        self.min_labels, self.max_labels = settings["min_labels"], settings["max_labels"]

    def execute(self, requests):
        """One response per request."""
        return [self.respond(request) for request in requests]

    def respond(self, request):
        logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy()
        names, confidence = self.decode(logits)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("label", names), pb_utils.Tensor("confidence", confidence)]
        )

    def decode(self, logits):
        """Logits [rows, classes] to names (UTF-8 bytes) and probabilities, both [rows, columns].

        A row holds its labels in the order of the classes, then b"" and 0 up to the most labels of
        a row. There is at least one column, so that no label is an ordinary answer.
        """
        logits = logits.astype(np.float32)
        small = np.exp(-np.abs(logits))  # see metric.probabilities
        probs = np.where(logits >= 0, 1, small) / (1 + small)
        decisions = self.decide(probs)
        columns = max(1, decisions.sum(axis=1).max())
        names = np.full((len(logits), columns), b"", dtype=np.object_)
        confidence = np.zeros((len(logits), columns), dtype=np.float32)
        for row, decided in enumerate(decisions):
            given = np.flatnonzero(decided)
            names[row, : len(given)] = [self.labels[i].encode("utf-8") for i in given]
            confidence[row, : len(given)] = probs[row, given]
        return names, confidence

    def decide(self, probs):
        """Boolean decisions [rows, classes]; see metric.decode."""
        decisions = probs > self.thresholds
        counts = decisions.sum(axis=1)
        wanted = np.clip(counts, self.min_labels, self.max_labels)
        rows = np.flatnonzero(wanted != counts)
        # Float64 keeps apart what float32 would round to equal differences.
        missing = self.thresholds - probs[rows].astype(np.float64)
        order = np.argsort(missing, axis=1, kind="stable")
        best = np.zeros_like(decisions[rows])
        np.put_along_axis(best, order, np.arange(probs.shape[1]) < wanted[rows, None], axis=1)
        decisions[rows] = best
        return decisions
