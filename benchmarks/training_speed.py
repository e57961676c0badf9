"""Training samples per second: train.py, its --batching random, two gloo processes, Hugging Face.

    python benchmarks/training_speed.py --dataset_dir data --model_name tiny_ernie \
        --torch_python torch_venv/bin/python

All take turns in one run on the same cores, with their defaults (dropout, batches of 32, length
128, AdamW). The last one runs benchmarks/hf_trainer.py with another Python, which needs torch,
transformers and accelerate; without --torch_python it is left out.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import utils  # noqa: E402

BATCH_SIZE = 32
LAUNCH = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", "--backend=gloo"]
SYSTEMS = {  # name: (launcher, flags)
    "train.py": ([], []),
    "train.py --batching random": ([], ["--batching", "random"]),
    "train.py, two gloo processes": (LAUNCH, []),
}
HUGGING_FACE = "Hugging Face Trainer, PyTorch"


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train.txt and label.txt")
    add("--model_name", required=True, help="model folder; its shape counts, not its weights")
    add("--torch_python", help="python with torch, transformers and accelerate")
    add("--texts", type=utils.at_least(128), default=1600, help="training texts, the first ones")
    add("--rounds", type=utils.at_least(1), default=3, help="times that each system has its turn")
    return parser.parse_args(argv)


def small_set(dataset_dir, texts, folder):
    """The first texts of the training set; almost no dev set, since only training is timed."""
    for name, number in (("train", texts), ("label", None), ("dev", 1)):
        source = Path(dataset_dir) / f"{'train' if name == 'dev' else name}.txt"
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.txt").write_text("".join(lines[:number]), encoding="utf-8")


def log_time(log, message):
    """When train.py logged a message for the last time, in seconds."""
    moment = re.findall(rf"^\[([\d :,-]+)\] .*{message}", log, re.MULTILINE)[-1]
    return datetime.strptime(moment, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def run_train(name, args, data, folder):
    """Samples per second from the end of the first step to the end of the last."""
    launcher, flags = SYSTEMS[name]
    processes = 2 if launcher else 1
    steps = args.texts // (BATCH_SIZE * processes)
    if launcher:
        launcher = [*launcher, f"--log_dir={folder}/log"]
    command = [sys.executable, *launcher, REPO / "train.py", "--device", "cpu", "--epochs", "1"]
    command += ["--dataset_dir", data, "--model_name", args.model_name, "--logging_steps", "1"]
    command += ["--save_dir", folder / "checkpoint", "--batch_size", str(BATCH_SIZE), *flags]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=folder)
    if run.returncode:
        raise utils.UserError(f"{name} failed:\n{run.stderr}")
    workers = sorted(Path(folder).glob("log/workerlog.*"))
    log = workers[0].read_text(encoding="utf-8") if workers else run.stderr
    seconds = log_time(log, f"global step {steps},") - log_time(log, "global step 1,")
    return (steps - 1) * processes * BATCH_SIZE / seconds


def run_hugging_face(args, data):
    command = [args.torch_python, REPO / "benchmarks" / "hf_trainer.py", "--dataset_dir", data]
    command += ["--model_name", args.model_name, "--steps", args.texts // BATCH_SIZE]
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if run.returncode:
        raise utils.UserError(f"{HUGGING_FACE} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])["samples_per_second"]


def main(argv=None):
    args = parse_args(argv)
    if args.texts % (2 * BATCH_SIZE):
        raise utils.UserError(f"--texts {args.texts}: must be a multiple of {2 * BATCH_SIZE}")
    names = [*SYSTEMS, *([HUGGING_FACE] if args.torch_python else [])]
    speeds = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as data:
        small_set(args.dataset_dir, args.texts, Path(data))
        for _ in range(args.rounds):
            for name in names:
                with tempfile.TemporaryDirectory() as folder:
                    if name == HUGGING_FACE:
                        speed = run_hugging_face(args, data)
                    else:
                        speed = run_train(name, args, data, Path(folder))
                speeds[name].append(speed)
                print(f"{name}: {speed:.1f} samples/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        row = {"system": name, "samples_per_second": round(median, 1)}
        row["rounds"] = [round(value, 1) for value in speeds[name]]
        row["times_random_batches"] = round(median / medians["train.py --batching random"], 2)
        if HUGGING_FACE in medians:
            row["times_hugging_face"] = round(median / medians[HUGGING_FACE], 2)
        print(json.dumps(row))


if __name__ == "__main__":
    utils.cli(main)
