"""Memory and seconds to the first step of train.py, cold and after SIGKILL, by number of texts.

python benchmarks/training_memory.py --dataset_dir data --model_name tiny_ernie \
    --texts 100000 1000000 --ranks 1 2

The training set is made of the lines of train.txt; every text gets a number of its own, so that no
two are equal. Prints a row per run; memory is in MB of one rank, the largest of the ranks: rss with
and anon without the pages of mapped files, which the ranks share and the system may drop.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import utils

POLL = 0.05  # seconds between two looks at the memory
FLAGS = "--device cpu --logging_steps 1 --epochs 1".split()  # of train.py


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    add("--model_name", required=True, help="as for train.py")
    add("--texts", type=utils.at_least(1), nargs="+", default=[100_000, 1_000_000], help="sizes")
    add("--ranks", type=utils.at_least(1), nargs="+", default=[1, 2], help="numbers of processes")
    add("--characters", type=utils.at_least(1), help="cut the texts, to save time; None: do not")
    add("--steps", type=utils.at_least(1), default=50, help="steps after which a run is killed")
    add("--work_dir", help="where the data is made; None: a temporary folder")
    add("--share_cache", action="store_true", help="encode once for all --ranks of a size")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for texts in args.texts:
        with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
            folder = Path(folder)
            megabytes = make_data(folder, Path(args.dataset_dir), texts, args.characters) / 1e6
            for ranks in args.ranks:
                save_dir = folder / f"ranks_{ranks}"
                cache = folder / "cache" if args.share_cache else None
                row = {"processor": utils.processor(), "texts": texts, "data_mb": megabytes}
                for start in ("cold", "resumed"):
                    found = run(args, folder, save_dir, ranks, cache)
                    common.print_row(**row, ranks=ranks, start=start, **found)


def make_data(folder, source, texts, characters):
    """Writes a data folder with a training set of this size; returns the bytes of that."""
    for name in ("dev.txt", "label.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    lines = (source / "train.txt").read_text(encoding="utf-8").splitlines()
    with open(folder / "train.txt", "w", encoding="utf-8", newline="\n") as file:
        for i, line in enumerate(itertools.islice(itertools.cycle(lines), texts)):
            text, labels = line.split("\t")
            file.write(f"{i} {text[:characters]}\t{labels}\n")
    return (folder / "train.txt").stat().st_size


def run(args, data, save_dir, ranks, cache):
    """Starts or continues a training and kills it after some steps; returns what was measured."""
    log, peaks = save_dir / "train_log.jsonl", {}
    if log.exists():  # what the killed run has logged is not taken for steps of this one
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    flags = {"dataset_dir": data, "save_dir": save_dir, "model_name": args.model_name}
    words = common.argv(common.TRAIN, *FLAGS, resume=True, cache_dir=cache, **flags)
    if ranks > 1:
        launch = ["-m", "paddle.distributed.launch", f"--nproc_per_node={ranks}"]
        words = [*launch, "--backend=gloo", f"--log_dir={data / 'log'}", *words]
    started, first, at_first = time.time(), None, {}
    with open(data / "output.txt", "wb") as output:
        process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=output)
        try:
            while (done := steps_in(log)) < args.steps:
                if process.poll() is not None:
                    common.check_status(process.args, process.returncode or 1, data / "output.txt")
                workers = [process.pid] if ranks == 1 else children(process.pid)
                for worker in workers:
                    peaks[worker] = peak(peaks.get(worker), memory(worker))
                if done and first is None:
                    first, at_first = time.time() - started, dict(peaks)
                time.sleep(POLL)
        finally:
            for worker in [*children(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            process.wait()
    rss, anon = (max(values) for values in zip(*at_first.values()))
    last_rss, last_anon = (max(values) for values in zip(*peaks.values()))
    result = {"seconds_to_first_step": first, "rss": rss, "anon": anon}
    return {**result, "rss_after_steps": last_rss, "anon_after_steps": last_anon}


def steps_in(log):
    """Steps that a running training has logged."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return sum(json.loads(line)["event"] == "train" for line in lines)


def children(pid):
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def memory(pid):
    """(resident memory, the part of it that belongs to no file) of a process, in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0, 0.0
    values = dict(line.split(":", 1) for line in lines)
    return tuple(int(values.get(k, "0 kB").split()[0]) / 1e3 for k in ("VmRSS", "RssAnon"))


def peak(before, now):
    return now if before is None else tuple(map(max, before, now))


if __name__ == "__main__":
    utils.cli(main)
