"""The models that server.py answers with, by name; a bundle that was replaced takes its place."""

import contextlib
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "predictor"))
from predictor import Predictor, bundle_folder

import metric
from utils import UserError, logger

ATTEMPTS = 5  # to read a bundle that is being replaced
PATIENCE = 1.0  # seconds
WARM_UP_LENGTHS = 16, 32, 64, 128, 256, 512


def parse_models(values):
    """{name: prefix} of NAME=PREFIX or PREFIX, which has the name of its folder."""
    models = {}
    for value in values:
        name, equals, prefix = value.rpartition("=")
        if not equals:
            name = Path(value).absolute().parent.name
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--model_path_prefix {value}: name the model, as in NAME={prefix}")
        if name in models:
            raise UserError(f"--model_path_prefix: two models are called {name}; use NAME=PREFIX")
        models[name] = prefix
    return models


def files_of(folder):
    """What changes when a bundle is replaced. Temporary files and locks do not count."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # it goes just now
                if entry.is_file() and not entry.name.startswith("."):
                    stat = os.stat(entry.path)
                    files.append((entry.name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return sorted(files)


class Models:
    """settings: arguments of Predictor for all of them. Raises UserError for a broken bundle."""

    def __init__(self, prefixes, batch_size, **settings):
        self.prefixes, self.batch_size, self.settings = prefixes, batch_size, settings
        self.warm = False
        self.seen, self.loaded = {}, {}  # by name: files_of its folder, Predictor
        for name in prefixes:
            self.loaded[name] = self.load(name)

    def load(self, name, patience=0):
        """A Predictor, all of whose files belong together. A bundle that can't be read is looked
        at again after `patience` seconds, as somebody may be writing it."""
        prefix = self.prefixes[name]
        folder = bundle_folder(prefix)
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; export_model.py makes one")
            self.seen[name] = files_of(folder)
            try:
                model = Predictor(prefix, batch_size=self.batch_size, **self.settings)
                if self.seen[name] == files_of(folder):
                    return model
            except UserError:
                time.sleep(patience)
                if self.seen[name] == files_of(folder):
                    raise
        raise UserError(f"{folder}: its files keep changing; load it again once they are written")

    def warm_up(self, model):
        """Runs the lengths and the largest batch, so that no request pays for memory and plans."""
        longest, token = model.info.max_seq_length, model.tokenizer.token_to_id("[UNK]")
        lengths = [length for length in WARM_UP_LENGTHS if length < longest]
        for shape in [(1, length) for length in [*lengths, longest]] + [(self.batch_size, longest)]:
            ids = np.full(shape, token, dtype=np.int64)
            if not np.isfinite(model.forward(ids, np.zeros_like(ids))).all():
                raise UserError("the model gives NaN or infinite values; export it again")

    def warm_up_all(self):
        for name, model in self.loaded.items():
            try:
                self.warm_up(model)
            except UserError as error:
                raise UserError(f"{self.prefixes[name]}: {error}") from error
            logger.info("model %s: ready, SHA-256 %s", name, model.info.model_sha256)
        self.warm = True

    def reload(self, changed_only):
        """Loads the bundles again, or those whose files have changed. Returns how many took their
        place and how many could not be read, so that the old ones stay."""
        taken = failed = 0
        for name, prefix in self.prefixes.items():
            try:
                folder = bundle_folder(prefix)
                if changed_only and folder.is_dir() and files_of(folder) == self.seen[name]:
                    continue
                model = self.load(name, PATIENCE)
                self.warm_up(model)
            except Exception as error:  # whatever a broken file makes a library raise
                if changed_only and not folder.is_dir():
                    continue  # it is being replaced
                reason = " ".join(str(error).split()) or repr(error)
                logger.error("model %s: not replaced, the old one stays: %s", name, reason)
                failed += 1
            else:
                old, self.loaded[name] = self.loaded[name], model
                sha256 = model.info.model_sha256
                logger.info("model %s: SHA-256 %s (was %s)", name, sha256, old.info.model_sha256)
                taken += 1
        return taken, failed

    def describe(self):
        """What GET /info says of them."""
        precision = self.settings["precision"]
        return [
            {
                "name": name,
                "model_sha256": model.info.model_sha256,
                "labels": model.info.labels,
                "thresholds": thresholds_of(model.info),
                "max_seq_length": model.info.max_seq_length,
                "min_labels": model.info.min_labels,
                "max_labels": model.info.max_labels,
                "precision": precision,
            }
            for name, model in self.loaded.items()
        ]


def thresholds_of(info):
    """One number per label."""
    return info.thresholds or [metric.DEFAULT_THRESHOLD] * len(info.labels)
