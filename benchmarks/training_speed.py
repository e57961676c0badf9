"""Training samples per second: train.py, its --batching random, two gloo processes, Hugging Face.

    python benchmarks/training_speed.py --dataset_dir data --model_name tiny_ernie \
        --torch_python torch_venv/bin/python

All take turns in one run on the same cores, with their defaults (dropout, batches of 32, length
128, AdamW). The last one runs benchmarks/hf_trainer.py with another Python, which needs torch,
transformers and accelerate; without --torch_python it is left out.
"""

import json
import re
import shutil
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import common

import utils

BATCH_SIZE = 32
LAUNCH = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", "--backend=gloo"]
SYSTEMS = {  # name: (launcher, flags)
    "train.py": ([], {}),
    "train.py --batching random": ([], {"batching": "random"}),
    "train.py, two gloo processes": (LAUNCH, {}),
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


def main(argv=None):
    args = parse_args(argv)
    if args.texts % (2 * BATCH_SIZE):
        raise utils.UserError(f"--texts {args.texts}: must be a multiple of {2 * BATCH_SIZE}")
    speeds = {name: [] for name in SYSTEMS}
    if args.torch_python:
        speeds[HUGGING_FACE] = []
    with tempfile.TemporaryDirectory() as data:
        small_set(args.dataset_dir, args.texts, Path(data))
        for _ in range(args.rounds):
            for name in speeds:
                with tempfile.TemporaryDirectory() as folder:
                    if name == HUGGING_FACE:
                        speed = run_hugging_face(args, data)
                    else:
                        speed = run_train(name, args, data, Path(folder))
                speeds[name].append(speed)
                print(f"{name}: {speed:.1f} samples/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        row = {"system": name, "samples_per_second": median, "rounds": speeds[name]}
        row["times_random_batches"] = median / medians["train.py --batching random"]
        if HUGGING_FACE in medians:
            row["times_hugging_face"] = median / medians[HUGGING_FACE]
        common.print_row(**row, processor=common.processor())


def small_set(dataset_dir, num_texts, folder):
    """The first texts of the training set; almost no dev set, since only training is timed."""
    labels, (texts, label_ids) = common.read_data(dataset_dir, "train.txt")
    for file, size in (("train.txt", num_texts), ("dev.txt", 1)):
        common.write_examples(folder / file, texts[:size], label_ids[:size], labels)
    shutil.copy(Path(dataset_dir) / "label.txt", folder)


def run_train(name, args, data, folder):
    """Samples per second from the end of the first step to the end of the last."""
    launcher, flags = SYSTEMS[name]
    processes = 2 if launcher else 1
    steps = args.texts // (BATCH_SIZE * processes)
    if launcher:
        launcher = [*launcher, f"--log_dir={folder}/log"]
    log = folder / "train.log"
    command = [*launcher, common.TRAIN, *"--device cpu --epochs 1 --logging_steps 1".split()]
    paths = {"dataset_dir": data, "model_name": args.model_name, "save_dir": folder / "checkpoint"}
    common.run(*command, log=log, batch_size=BATCH_SIZE, **paths, **flags)
    log = next(folder.glob("log/workerlog.0"), log)
    seconds = log_time(log, f"global step {steps},") - log_time(log, "global step 1,")
    return (steps - 1) * processes * BATCH_SIZE / seconds


def log_time(log, message):
    """When train.py logged a message for the last time, in seconds."""
    text = log.read_text(encoding="utf-8")
    moment = re.findall(rf"^\[([\d :,-]+)\] .*{message}", text, re.MULTILINE)[-1]
    return datetime.strptime(moment, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def run_hugging_face(args, data):
    script = Path(__file__).with_name("hf_trainer.py")
    flags = {"model_name": args.model_name, "steps": args.texts // BATCH_SIZE}
    output = common.run(script, python=args.torch_python, dataset_dir=data, **flags)
    return json.loads(output.splitlines()[-1])["samples_per_second"]


if __name__ == "__main__":
    utils.cli(main)
