"""What the benchmarks share: running a script of the project, data, figures, printing.

Importing it puts the project's folders on sys.path, so it comes before the project's modules.
"""

import contextlib
import json
import multiprocessing
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ["", "analysis", "data"]
FOLDERS += [f"deploy/{name}" for name in ("predictor", "paddle_serving", "triton_serving")]
sys.path[:0] = [str(REPO / folder) for folder in FOLDERS]

import metric  # noqa: E402
import utils  # noqa: E402

TRAIN = REPO / "train.py"
F1S = ("micro_f1", "macro_f1")


# ------------------------------------------------------------------------------------- processes
def argv(*words, **flags):
    """Command-line words: argv("a", seed=3, resume=True, loss=None) is a --seed=3 --resume."""
    words = [str(word) for word in words]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def run(*words, python=sys.executable, log=None, **flags):
    """Runs a script (see argv) as a process; returns what it prints.

    Its stderr goes where this process's goes, or to the end of the file `log`. Raises UserError if
    it fails.
    """
    command = [python, *argv(*words, **flags)]
    with open(log, "ab") if log else contextlib.nullcontext() as stderr:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    check_status(command, result.returncode, log)
    return result.stdout


def check_status(command, status, log=None):
    """Raises UserError with the end of its log, a file, if a process has failed."""
    if status:
        reason = "its message is above"
        if log:
            lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
            reason = "\n".join(lines[-10:])
        raise utils.UserError(f"exit status {status} of {shlex.join(command)}: {reason}")


def train(dataset_dir, save_dir, *words, **flags):
    """Runs train.py, or what is left of the run in save_dir; returns its dev F1s in percent."""
    run(TRAIN, *words, dataset_dir=dataset_dir, save_dir=save_dir, resume=True, **flags)
    lines = (Path(save_dir) / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    best = json.loads(lines[-1])  # the line "end" holds the figures of the saved model
    return {name: 100 * best[name] for name in F1S}


def in_new_process(function, *args):
    """The function's result from a new process: libraries read some settings once a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ------------------------------------------------------------------------------------------ data
def read_data(dataset_dir, *files):
    """Label names of a data folder, then (texts, label ids) of each file."""
    folder = Path(dataset_dir)
    labels = utils.read_labels(folder / "label.txt")
    return labels, *(utils.read_examples(folder / file, labels) for file in files)


def read_first_column(dataset_dir, file):
    """The texts of a file, with or without labels."""
    return [line.split("\t")[0] for line in utils.read_texts(Path(dataset_dir) / file)]


def write_examples(path, texts, label_ids, labels):
    with utils.atomic_file(path) as file:
        names = [[labels[i] for i in ids] for ids in label_ids]
        utils.write_rows(file, texts, names, labels, jsonl=False)


def write_data(folder, source, texts, label_ids, labels):
    """A data folder with this training set and the dev set of the folder `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dev.txt", "label.txt"):
        shutil.copyfile(Path(source) / name, folder / name)
    write_examples(folder / "train.txt", texts, label_ids, labels)


# --------------------------------------------------------------------------------------- figures
def count(decisions, label_ids):
    """metric.MultiLabelCounts of decisions [texts, classes]."""
    counts = metric.MultiLabelCounts(decisions.shape[1])
    counts.update(decisions, utils.multi_hot(label_ids, decisions.shape[1]))
    return counts


def f1_percent(counts):
    return {name: 100 * getattr(counts, name) for name in F1S}


class Stopwatch:
    """A forward (see utils.Labeller) that keeps the seconds and the batch shape of each call."""

    def __init__(self, forward):
        self.forward, self.times, self.shapes = forward, [], []

    def __call__(self, **batch):
        start = time.perf_counter()
        logits = self.forward(**batch)
        self.times.append(time.perf_counter() - start)
        self.shapes.append(batch["input_ids"].shape)
        return logits


def rounded(value):
    """Floats with four significant digits, also inside lists and dictionaries."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def print_row(**row):
    print(json.dumps(rounded(row), ensure_ascii=False), flush=True)
