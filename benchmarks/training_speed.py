"""Training on the CPU: train.py against Hugging Face Trainer, other versions, fewer cores.

    python benchmarks/training_speed.py --dataset_dir data --model_name tiny_ernie \
        --torch_python torch_venv/bin/python

The systems take turns in one run on the same cores, with their defaults (dropout, AdamW), batches
of 32 and length 128; the median of the rounds counts. A round is one epoch over the same texts,
from the start of the first step to the end of the last: reading, tokenising, evaluation and saving
are not counted. Each row compares with Hugging Face grouped by length (which its users get by one
setting), with --before and with one core, and says what share of the sgemm limit is used: the
FLOP/s that these texts need (see training_flops) over the FLOP/s of a large fp32 matrix product
on all cores. So one core can't reach 100 %, and bf16 may exceed it.

hf_trainer.py runs Hugging Face with --torch_python, which needs torch, transformers and accelerate.
Hugging Face groups within a quarter of the texts or 50 batches, whichever is less: its padding is
23 % of CAIL2019's first 640 texts, 10 % of 1600, 2 % of 6400 (train.py: 5, 2, 2 %), so fewer than
6400 texts favour train.py.

--before: another checkout of this project. --original: PaddleNLP's folder
applications/text_classification/multi_label. Where its train.py has `choices` for --model_name,
remove them, since the model here is a folder.
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import timeit
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import common
import numpy as np

import utils

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")

BATCH_SIZE, MAX_SEQ_LENGTH = 32, 128
LAUNCH = ["-m", "paddle.distributed.launch", "--nproc_per_node=2", "--backend=gloo"]
BF16 = {"avx512_bf16", "amx_bf16"}  # of /proc/cpuinfo: the processor multiplies in bf16
SYSTEMS = {  # key: name
    "train": "train.py",
    "random": "train.py --batching random",
    "gloo": "train.py, two gloo processes",
    "one_core": "train.py, one process on one core",
    "before": "train.py of --before",
    "original": "the original's train.py",
    "hf_grouped": "Hugging Face, grouped by length",
    "hf_dynamic": "Hugging Face, padded to the longest of the batch",
    "hf_padded": f"Hugging Face, padded to {MAX_SEQ_LENGTH}",
    "hf_bf16": "Hugging Face, grouped by length, bf16",
}
COMPARED = {"hf_grouped": "Hugging Face grouped = 1", "before": "before = 1"}
COMPARED |= {"one_core": "one core = 1"}
HEADER = ["system", "one epoch", "samples/s: median (rounds)", *COMPARED.values()]
HEADER += ["share of the sgemm limit"]


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train.txt and label.txt")
    add("--model_name", required=True, help="model folder; its shape counts, not its weights")
    add("--torch_python", help="python with torch, transformers and accelerate")
    add("--before", help="folder with another version of this project")
    add("--original", help="folder with the original PaddleNLP application")
    add("--texts", type=utils.at_least(128), default=1600, help="training texts, the first ones")
    add("--original_texts", type=utils.at_least(32), default=128, help="those of --original")
    add("--rounds", type=utils.at_least(1), default=3, help="times that each system has its turn")
    add("--systems", nargs="+", choices=SYSTEMS, help="None: all that this machine and flags allow")
    args = parser.parse_args(argv)
    for name, texts, least in (
        ("texts", args.texts, 2 * BATCH_SIZE),
        ("original_texts", args.original_texts, BATCH_SIZE),
    ):
        if texts % least:
            raise utils.UserError(f"--{name} {texts}: must be a multiple of {least}")
    for flag in ("before", "original"):
        folder = getattr(args, flag)
        if folder is not None and not (Path(folder) / "train.py").is_file():
            raise utils.UserError(f"--{flag} {folder}: has no train.py")
    missing = why_not(args)
    for key in args.systems or ():
        if key in missing:
            raise utils.UserError(f"--systems {key}: needs {missing[key]}")
    args.systems = args.systems or [key for key in SYSTEMS if key not in missing]
    return args


def why_not(args):
    """What each system needs that cannot run here."""
    missing = {}
    for key in SYSTEMS:
        if key in ("before", "original") and getattr(args, key) is None:
            missing[key] = f"--{key}"
        elif key.startswith("hf_") and args.torch_python is None:
            missing[key] = "--torch_python"
        elif key == "hf_bf16" and not BF16 & processor_flags():
            missing[key] = "a processor with " + " or ".join(sorted(BF16))
        elif key == "one_core" and not hasattr(os, "sched_setaffinity"):
            missing[key] = "Linux"
    return missing


def processor_flags():
    """The instruction sets of /proc/cpuinfo; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return set(text.partition("\nflags")[2].partition("\n")[0].split())


def main(argv=None):
    args = parse_args(argv)
    speeds, limits = {key: [] for key in args.systems}, []
    with tempfile.TemporaryDirectory() as folder:
        sets = dict.fromkeys(speeds, small_set(args, args.texts, Path(folder) / "all"))
        if "original" in sets:
            sets["original"] = small_set(args, args.original_texts, Path(folder) / "few")
        for _ in range(args.rounds):
            limits += [common.in_new_process(library) for library in (numpy_gflops, paddle_gflops)]
            for key, used in sets.items():
                with tempfile.TemporaryDirectory() as work_dir:
                    seconds = run_epoch(key, args, used, Path(work_dir))
                speeds[key].append(used.texts / seconds)
                message = f"{SYSTEMS[key]}: {speeds[key][-1]:.1f} samples/s"
                print(message, file=sys.stderr, flush=True)
    print_table(speeds, sets, max(limits))


def print_table(speeds, sets, limit):
    """Markdown. speeds: samples/s of each system's rounds; sets: its data; limit: in GFLOP/s."""
    processor = f"{utils.processor()}, {utils.num_cores()} core(s)"
    print(f"{processor}, sgemm limit {limit:.0f} GFLOP/s\n")
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    for cells in (HEADER, ["---"] * len(HEADER)):
        print_cells(cells)
    for key, median in medians.items():
        data = sets[key]
        epoch = f"{data.texts} texts, {data.tokens} tokens, {data.flops / 1e9:.0f} GFLOP"
        rounds = ", ".join(f"{speed:.1f}" for speed in speeds[key])
        share = data.flops * median / data.texts / 1e9 / limit
        bases = [medians.get(other) for other in COMPARED]
        ratios = [f"{median / base:.2f}" if base else "" for base in bases]
        print_cells([SYSTEMS[key], epoch, f"{median:.1f} ({rounds})", *ratios, f"{share:.0%}"])


def print_cells(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


# ------------------------------------------------------------------------------------------ data
def small_set(args, num_texts, folder):
    """Writes a data folder with the first texts of the training set and almost no dev set, since
    only training is timed. Returns its folder, texts, tokens, flops (of one epoch)."""
    labels, (texts, label_ids) = common.read_data(args.dataset_dir, "train.txt")
    if len(texts) < num_texts:
        path = Path(args.dataset_dir) / "train.txt"
        raise utils.UserError(f"{path}: {len(texts)} texts, fewer than the {num_texts} wanted")
    folder.mkdir()
    for file, size in (("train.txt", num_texts), ("dev.txt", 1)):
        common.write_examples(folder / file, texts[:size], label_ids[:size], labels)
    shutil.copy(Path(args.dataset_dir) / "label.txt", folder)
    tokenizer = utils.load_tokenizer(args.model_name)
    lengths = [len(ids) for ids in utils.encode(texts[:num_texts], tokenizer, MAX_SEQ_LENGTH)[0]]
    config = utils.read_json(Path(args.model_name) / utils.CONFIG_FILE)
    flops = training_flops(config, lengths, len(labels))
    return SimpleNamespace(folder=folder, texts=num_texts, tokens=sum(lengths), flops=flops)


def training_flops(config, lengths, num_labels):
    """Floating-point operations that one epoch needs, with 2 for a multiplication and addition.

    Counted are the products with weights (4 of attention, 2 of the feed-forward layer; pooler,
    classifier) and the two of attention; the backward pass takes twice as many as the forward
    pass. Padding does not count, nor do embeddings, norms, activations and the optimizer (Kaplan
    et al. 2020, section 2.1). config: the model's config.json; lengths: tokens of each text.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    layer = 2 * tokens * (4 * hidden**2 + 2 * hidden * inner) + 2 * 2 * pairs * hidden
    head = 2 * len(lengths) * (hidden**2 + hidden * num_labels)
    return 3 * (config["num_hidden_layers"] * layer + head)


# --------------------------------------------------------------------------------------- systems
def run_epoch(key, args, data, work_dir):
    """Seconds of one epoch of a system, in processes of its own."""
    if key.startswith("hf_"):
        return run_hugging_face(key, args, data)
    script = {"before": args.before, "original": args.original}.get(key)
    script = Path(script) / "train.py" if script else common.TRAIN
    launch = [*LAUNCH, f"--log_dir={work_dir}/log"] if key == "gloo" else []
    flags = {"batching": "random"} if key == "random" else {}
    log = work_dir / "train.log"
    with one_core() if key == "one_core" else contextlib.nullcontext():
        common.run(
            *(*launch, script),
            log=log,
            device="cpu",
            epochs=1,
            logging_steps=1,
            batch_size=BATCH_SIZE,
            max_seq_length=MAX_SEQ_LENGTH,
            dataset_dir=data.folder,
            model_name=args.model_name,
            save_dir=work_dir / "checkpoint",
            **flags,
        )
    log = next(work_dir.glob("log/workerlog.0"), log)
    steps = data.texts // (BATCH_SIZE * (2 if launch else 1))
    return epoch_seconds(script, log.read_text(encoding="utf-8"), steps, key == "original")


def epoch_seconds(script, log, steps, original=False):
    """From the start of the first step to the end of the last, by the log lines of all steps.

    When the first one began is in no log line, but its speed is (the original divides 10 by
    a step's seconds, whatever --logging_steps). Raises UserError if a step is missing.
    """
    pattern = r"\[([\d :,-]+)\].* global step (\d+),.* speed: ([\d.]+) step/s"
    lines = {int(step): (moment, float(speed)) for moment, step, speed in re.findall(pattern, log)}
    if sorted(lines) != list(range(1, steps + 1)):
        found = f"log lines of {len(lines)} steps, not of {steps}"
        raise utils.UserError(f"{script}: {found}; its log must read as this project's train.py's")
    first, last = (
        datetime.strptime(lines[step][0], "%Y-%m-%d %H:%M:%S,%f").timestamp() for step in (1, steps)
    )
    return last - first + (10 if original else 1) / lines[1][1]


@contextlib.contextmanager
def one_core():
    """This process, and those that it starts meanwhile, run on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run_hugging_face(key, args, data):
    batching = key.removeprefix("hf_").replace("bf16", "grouped")
    output = common.run(
        Path(__file__).with_name("hf_trainer.py"),
        python=args.torch_python,
        dataset_dir=data.folder,
        model_name=args.model_name,
        batch_size=BATCH_SIZE,
        max_seq_length=MAX_SEQ_LENGTH,
        batching=batching,
        bf16=key == "hf_bf16" or None,
    )
    return json.loads(output.splitlines()[-1])["seconds"]


# ----------------------------------------------------------------------------------- sgemm limit
def numpy_gflops():
    return max_gflops(lambda a, b: a @ b, lambda array: array)


def paddle_gflops():
    model.set_device("cpu")
    return max_gflops(paddle.matmul, paddle.to_tensor)


def max_gflops(matmul, convert):
    """GFLOP/s of the fastest fp32 product of two square matrices."""
    rng, best = np.random.default_rng(0), 0
    for size in (1024, 2048):
        a, b = (convert(rng.normal(size=(size, size)).astype(np.float32)) for _ in range(2))
        best = max(
            best, 2 * size**3 / min(timeit.repeat(lambda: matmul(a, b), number=1, repeat=10)) / 1e9
        )
    return best


if __name__ == "__main__":
    utils.cli(main)
