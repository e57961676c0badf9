"""Trains, predicts and runs the predictor on a GPU, compares all results with the CPU's.

    python benchmarks/gpu_check.py

needs no data, no download and about five minutes, and prints one table. Of this project only
infer.py has been run on a GPU: please paste the table into an issue. `--device cpu` compares the
CPU with itself.
"""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import utils
from utils import UserError

PREDICT, EXPORT = common.REPO / "predict.py", common.REPO / "export_model.py"
INFER = common.REPO / "deploy" / "predictor" / "infer.py"
PACKAGES = "paddlepaddle-gpu", "paddlepaddle", "onnxruntime-gpu", "onnxruntime", "numpy"
F1_POINTS = 3.0  # a training on the other device may differ by so much
# Of the probabilities of the same weights: TF32, which GPUs take for float32, has 10 bits.
LIMITS = {"fp32": 0.01, "fp16": 0.05}
TRAINING = "--learning_rate 1e-3 --warmup --warmup_steps 100 --max_grad_norm 1".split()
TRAINING += "--dropout 0 --batch_size 8".split()


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--device", default="gpu", help="the device to check: gpu, gpu:1 ... or cpu")
    add("--dataset_dir", default=common.REPO / "data", help="folder with train, dev, label.txt")
    add("--shape", default="tiny", help="shape of the random model; see data/init_model.py")
    add("--epochs", type=utils.at_least(1), default=6, help="of each training")
    add("--work_dir", help="keep models and logs there; None: a temporary folder")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.work_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = Check(args, folder).run()
    print(*machine(), sep="\n")
    print("\n| what | on | result | on the CPU | seconds | CPU seconds | verdict |")
    print("|---|---|---|---|---|---|---|", *rows, sep="\n")
    if not all(row.endswith("| ok |") for row in rows):
        sys.exit(1)


def machine():
    """Lines that say what was tested."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield f"Python {platform.python_version()}, {', '.join(found)}; {utils.processor()}"
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"
        yield subprocess.run(["nvidia-smi", *query], capture_output=True, text=True).stdout.strip()


class Check:
    """Runs every step on the CPU and on args.device; a step that fails becomes a row that says so.

    Models, results and log.txt are in `folder`.
    """

    def __init__(self, args, folder):
        self.args, self.folder, self.log, self.rows = args, folder, folder / "log.txt", []
        self.number, self.is_gpu = args.device.partition(":")[2] or 0, args.device != "cpu"
        self.data = {"dataset_dir": args.dataset_dir}

    def run(self):
        args, start = self.args, self.folder / "random_ernie"
        script = common.REPO / "data" / "init_model.py"
        model = {"output_dir": start, "shape": args.shape, **self.data}
        common.run(script, log=self.log, **model)
        texts = common.read_first_column(args.dataset_dir, "train.txt")
        self.texts = {"dataset_dir": self.folder, "data_file": "texts.txt"}
        (self.folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        trained = self.measured(self.train, "cpu", "cpu")
        self.compare("train.py", args.device, trained, self.train, "gpu", args.device)
        if self.is_gpu:
            self.compare("train.py --amp", args.device, trained, self.train, "amp", args.device)
        predicted = self.measured(self.predict, "cpu")
        self.compare("predict.py", args.device, predicted, self.predict, args.device)
        checkpoint = {"params_path": self.folder / "cpu", "output_path": self.folder / "export"}
        common.run(EXPORT, log=self.log, onnx=True, **checkpoint)
        infer = ("infer.py", args.device, predicted, self.infer)
        self.compare(*infer, args.device.partition(":")[0], "fp32")
        if self.is_gpu:
            self.compare("infer.py --use_fp16", *infer[1:], "gpu", "fp16")
        return self.rows

    def measured(self, function, *args):
        start = time.perf_counter()
        result = function(*args)
        return result, time.perf_counter() - start

    def compare(self, what, device, expected, function, *args):
        """Runs function(*args) on the device and adds the row that compares it with the CPU's
        (result, seconds)."""
        (reference, cpu_seconds), precision = expected, args[-1] if args[-1] in LIMITS else "fp32"
        try:
            result, seconds = self.measured(function, *args)
        except UserError as error:
            reason = str(error).strip().splitlines()[-1].replace("|", "/")
            self.rows.append(f"| {what} | {device} | {reason} | | | {cpu_seconds:.1f} | failed |")
            return
        if isinstance(reference, dict):  # of a training
            line = "micro F1 {micro_f1:.2f}, macro F1 {macro_f1:.2f}"
            shown = [line.format(**result), line.format(**reference)]
            good = all(abs(result[name] - reference[name]) <= F1_POINTS for name in common.F1S)
        else:
            same = sum(a[:2] == b[:2] for a, b in zip(result, reference, strict=True)) - 1
            pairs = (zip(a[2:], b[2:]) for a, b in zip(result[1:], reference[1:]))
            most = max(abs(float(a) - float(b)) for row in pairs for a, b in row)
            texts = len(reference) - 1
            shown = [f"{same} of {texts} the same, largest difference {most:.1e}", f"{texts} texts"]
            good = same >= 0.99 * texts and most <= LIMITS[precision]
        times = f"{seconds:.1f} | {cpu_seconds:.1f}"
        verdict = "ok" if good else "differs"
        self.rows.append(f"| {what} | {device} | {' | '.join(shown)} | {times} | {verdict} |")

    def train(self, name, device):
        """Dev F1s in percent of a training from the same weights, in folder/name."""
        flags = {"model_name": self.folder / "random_ernie", "epochs": self.args.epochs}
        flags |= {"device": device, "amp": name == "amp" or None, "log": self.log}
        return common.train(self.args.dataset_dir, self.folder / name, *TRAINING, **flags)

    def predict(self, device):
        """The rows that predict.py writes for the model that was trained on the CPU."""
        output = self.folder / f"predict_{re.sub('[^a-z0-9]', '_', device)}.txt"
        flags = {"params_path": self.folder / "cpu", "device": device, "output_file": output}
        common.run(PREDICT, log=self.log, output_scores=True, **flags, **self.texts)
        return read_rows(output)

    def infer(self, device, precision):
        """The same from ONNX Runtime."""
        output = self.folder / f"infer_{device}_{precision}.txt"
        flags = {"model_path_prefix": self.folder / "export" / "float32", "device": device}
        flags |= {"use_fp16": precision == "fp16" or None, "output_file": output}
        number = {"device_id": self.number if device == "gpu" else None}
        common.run(INFER, log=self.log, output_scores=True, **flags, **number, **self.texts)
        return read_rows(output)


def read_rows(path):
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    utils.cli(main)
