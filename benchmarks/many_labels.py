"""Time and memory of train.py, evaluate.py and predict.py with many labels, in a table.

    python benchmarks/many_labels.py --sizes 1000x10000 10000x10000 10000x100000

Each size is labels x training texts. The set is synthetic: short texts, one to three labels each
with Zipf-distributed frequencies; dev has a tenth of the texts, data.txt as many as train. A tiny
random ERNIE is trained for one epoch, evaluated on train and dev and labels data.txt, each in a
process of its own, start and end included; seconds are those of the CPU, which do not depend on
what else the machine does. "dense" is what one float32 matrix [training texts, labels] would take.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import init_model
import numpy as np

import utils

ALPHABET = [chr(0x4E00 + i) for i in range(600)]  # of the texts
KEY_CHARACTERS = 300  # the first of them; two make a label's key word
SEED = 3
COLUMNS = "labels | training texts | script | CPU seconds | texts/s | peak MiB | dense MiB"


def parse_size(value):
    """ "10000x100000" to (10000, 100000)."""
    try:
        labels, texts = map(int, value.split("x"))
    except ValueError:
        labels = texts = 0
    if not (1 < labels <= KEY_CHARACTERS**2 and texts >= 10):
        raise argparse.ArgumentTypeError(f"{value} is not like 10000x100000 (labels x texts)")
    return labels, texts


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    sizes = [(1000, 10_000), (10_000, 10_000), (10_000, 100_000)]
    add = parser.add_argument
    add("--sizes", type=parse_size, nargs="+", default=sizes, help="labels x training texts")
    return parser.parse_args(argv)


def make_set(folder, num_labels, num_texts):
    """Writes train, dev, data and label files; label i is called for by a key word of its own."""
    rng = np.random.default_rng(SEED)
    pairs = rng.permutation(KEY_CHARACTERS**2)[:num_labels]
    words = [ALPHABET[p // KEY_CHARACTERS] + ALPHABET[p % KEY_CHARACTERS] for p in pairs]
    (folder / "label.txt").write_text("".join(f"label{i}\n" for i in range(num_labels)))
    frequency = 1 / np.arange(1, num_labels + 1)
    frequency /= frequency.sum()
    for name, size in (("train", num_texts), ("dev", num_texts // 10), ("data", num_texts)):
        chosen = rng.choice(num_labels, (size, 3), p=frequency)
        noise = rng.integers(KEY_CHARACTERS, len(ALPHABET), (size, 6))
        counts = rng.integers(1, 4, size)
        with open(folder / f"{name}.txt", "w", encoding="utf-8") as file:
            for labels, count, characters in zip(chosen.tolist(), counts.tolist(), noise.tolist()):
                labels = list(dict.fromkeys(labels[:count]))
                text = "".join(ALPHABET[i] for i in characters)
                text += "".join(words[i] for i in labels)
                names = ",".join(f"label{i}" for i in labels)
                file.write(text + ("\n" if name == "data" else f"\t{names}\n"))


def measured(*words, **flags):
    """Runs a script; returns (CPU seconds, MiB of memory at most) of that process alone."""
    command = [sys.executable, *common.argv(*words, **flags)]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        common.check_status(command, process.returncode, log.name)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def run_size(num_labels, num_texts):
    """Yields a row of COLUMNS per script; texts/s counts the texts that the script runs once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder, num_labels, num_texts)
        flags = {"output_dir": folder / "model", "dataset_dir": folder, "max_position": 64}
        init_model.main(common.argv(**flags))
        checkpoint = folder / "checkpoint"
        trained = {"epochs": 1, "learning_rate": 1e-3, "logging_steps": 100}
        trained |= {"model_name": folder / "model", "save_dir": checkpoint}
        evaluated = {"params_path": checkpoint, "bad_case_path": folder / "bad_case.txt"}
        predicted = {"params_path": checkpoint, "output_file": folder / "output.txt"}
        commands = {
            "train.py": (num_texts, trained),
            "analysis/evaluate.py": (num_texts + num_texts // 10, evaluated),
            "predict.py": (num_texts, predicted),
        }
        shared = {"device": "cpu", "dataset_dir": folder, "max_seq_length": 32}
        for script, (texts, flags) in commands.items():
            seconds, memory = measured(common.REPO / script, **shared, **flags)
            dense = 4 * num_labels * num_texts / 2**20
            figures = (f"{value:.0f}" for value in (seconds, texts / seconds, memory, dense))
            yield [str(num_labels), str(num_texts), Path(script).name, *figures]


def main(argv=None):
    args = parse_args(argv)
    print(f"Processor: {utils.processor()}\n")
    print(f"| {COLUMNS} |\n{'|---' * (COLUMNS.count('|') + 1)}|", flush=True)
    for size in args.sizes:
        for row in run_size(*size):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    utils.cli(main)
