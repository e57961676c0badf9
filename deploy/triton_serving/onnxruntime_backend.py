"""Stand-in for Triton's onnxruntime backend, which the PyPI package nvidia-pytriton does not carry.

local_server.py installs it. It is a Python-based backend: the server loads it for every model whose
config.pbtxt says `platform: "onnxruntime_onnx"` and gives it that model's unchanged folder. Like
the real one it runs the requests of one dynamic batch as one ONNX Runtime call.
"""

import json
import os

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        folder = os.path.join(args["model_repository"], args["model_version"])
        path = os.path.join(folder, config["default_model_filename"] or "model.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        tensors = [
            {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self.inputs}
            for request in requests
        ]
        merged = {name: np.concatenate([t[name] for t in tensors]) for name in self.inputs}
        results = self.session.run(self.outputs, merged)
        responses, start = [], 0
        for tensor in tensors:
            end = start + len(tensor[self.inputs[0]])
            rows = zip(self.outputs, results)
            outputs = [pb_utils.Tensor(name, result[start:end]) for name, result in rows]
            responses.append(pb_utils.InferenceResponse(outputs))
            start = end
        return responses
