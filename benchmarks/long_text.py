"""What does --long_text window find that truncation cuts off, and what does it cost?

    python benchmarks/long_text.py --dataset_dir data --params_path checkpoint
    python benchmarks/long_text.py --dataset_dir data --tails

Labels the samples of --dev_file that are longer than max_seq_length; with --tails instead made-up
ones whose evidence lies in the tail: each shorter sample with labels, behind samples without labels
that fill max_seq_length. Without --params_path the tiny model of `make demo` is trained first (two
minutes). Each mode is timed once, tokenisation included, after a warm-up.
"""

import sys
import time
from pathlib import Path

import common
import init_model
import numpy as np

import utils

model = utils.LazyModule("model")

WARM_UP = 64  # texts
SEED = 3  # of the choice of samples without labels
DEMO = "--epochs 12 --batch_size 8 --learning_rate 1e-3 --dropout 0 --warmup --warmup_steps 100 "
DEMO += "--max_grad_norm 1 --logging_steps 50 --device cpu"  # the flags of `make demo`


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder of the data and label files")
    add("--dev_file", default="dev.txt", help="labelled texts")
    add("--params_path", help="checkpoint folder; None: train the tiny model on --dataset_dir")
    add("--work_dir", default="long_text", help="for the tiny model; a finished one is reused")
    add("--tails", action="store_true", help="made-up texts whose evidence lies in the tail")
    add("--max_seq_length", type=utils.at_least(3), help="longest sequence; None: the checkpoint's")
    add("--batch_size", type=utils.at_least(1), default=32, help="windows per forward pass")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    params_path = args.params_path or train_tiny(args.dataset_dir, Path(args.work_dir))
    info = utils.read_model_info(params_path).with_settings(args.max_seq_length)
    path = Path(args.dataset_dir) / args.dev_file
    texts, label_ids = utils.read_examples(path, info.labels)
    labeller = model.load_labeller(params_path, "cpu", info, batch_size=args.batch_size)
    room = info.max_seq_length - 2
    lengths = [len(ids) - 2 for ids in utils.encode(texts, labeller.tokenizer, sys.maxsize)[0]]
    if args.tails:
        texts, label_ids = tail_set(texts, label_ids, lengths, room)
    else:
        kept = [i for i, length in enumerate(lengths) if length > room]
        if not kept:
            raise utils.UserError(f"{path}: no text is longer than max_seq_length")
        texts, label_ids = [texts[i] for i in kept], [label_ids[i] for i in kept]
    for long_text in ("truncate", "window"):
        labeller.long_text = long_text
        measure(labeller, texts, label_ids)


def train_tiny(dataset_dir, work):
    """The checkpoint folder of the model of `make demo`."""
    init_model.main(common.argv(output_dir=work / "tiny", dataset_dir=dataset_dir))
    common.train(dataset_dir, work / "checkpoint", *DEMO.split(), model_name=work / "tiny")
    return work / "checkpoint"


def tail_set(texts, label_ids, lengths, room):
    """(texts, label ids) of the samples with labels of at most `room` tokens, filler in front."""
    rng = np.random.default_rng(SEED)
    filler = [i for i, ids in enumerate(label_ids) if not ids]
    if not filler:
        raise utils.UserError("--tails needs samples without labels; there are none")
    long_texts, kept_ids = [], []
    for text, ids, length in zip(texts, label_ids, lengths):
        if not ids or length > room:
            continue
        front, filled = "", 0
        while filled < room:
            i = rng.choice(filler)
            front, filled = front + texts[i], filled + lengths[i]
        long_texts.append(front + text)
        kept_ids.append(ids)
    return long_texts, kept_ids


def measure(labeller, texts, label_ids):
    labeller.decide(texts[:WARM_UP])
    start = time.perf_counter()
    decisions, _ = labeller.decide(texts)
    seconds = time.perf_counter() - start
    counts = common.count(decisions, label_ids)
    micro = counts.report(labeller.info.labels)["micro"]
    common.print_row(
        long_text=labeller.long_text,
        texts=len(texts),
        windows=len(labeller.encode(texts)),
        **common.f1_percent(counts),
        micro_precision=100 * micro["precision"],
        micro_recall=100 * micro["recall"],
        labels_per_text=decisions.sum() / len(texts),
        gold_labels_per_text=sum(map(len, label_ids)) / len(texts),
        texts_per_second=len(texts) / seconds,
        processor=utils.processor(),
    )


if __name__ == "__main__":
    utils.cli(main)
