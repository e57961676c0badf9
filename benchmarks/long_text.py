"""What does --long_text window find that truncation cuts off, and what does it cost?

    python benchmarks/long_text.py --dataset_dir data --params_path checkpoint
    python benchmarks/long_text.py --dataset_dir data --tails

Labels the samples of --dev_file that are longer than max_seq_length; with --tails instead made-up
ones whose evidence lies in the tail: each shorter sample with labels, behind samples without labels
that fill max_seq_length. Without --params_path the tiny model of `make demo` is trained first (two
minutes). Each mode is timed once, tokenisation included, after a warm-up.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import metric  # noqa: E402
import utils  # noqa: E402
from predict import load_forward  # noqa: E402
from utils import UserError  # noqa: E402

WARM_UP = 64  # texts
SEED = 3  # of the choice of samples without labels
TRAIN = "--epochs 12 --batch_size 8 --learning_rate 1e-3 --dropout 0 --warmup --warmup_steps 100 "
TRAIN += "--max_grad_norm 1 --logging_steps 50 --resume"  # a finished run is reused


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder of the data and label files")
    add("--dev_file", default="dev.txt", help="labelled texts")
    add("--params_path", help="checkpoint folder; None: train the tiny model on --dataset_dir")
    add("--work_dir", default="long_text", help="for the tiny model")
    add("--tails", action="store_true", help="made-up texts whose evidence lies in the tail")
    add("--max_seq_length", type=utils.at_least(3), help="longest sequence; None: the checkpoint's")
    add("--batch_size", type=utils.at_least(1), default=32, help="windows per forward pass")
    return parser.parse_args(argv)


def train_tiny(dataset_dir, work):
    """The checkpoint folder of the model of `make demo`."""
    import init_model

    import train

    init_model.main(["--output_dir", str(work / "tiny"), "--dataset_dir", str(dataset_dir)])
    flags = ["--device", "cpu", "--dataset_dir", dataset_dir, "--model_name", work / "tiny"]
    flags += ["--save_dir", work / "checkpoint", *TRAIN.split()]
    train.main([str(flag) for flag in flags])
    return work / "checkpoint"


def tail_set(texts, label_ids, lengths, room):
    """(texts, label ids) of the samples with labels of at most `room` tokens, filler in front."""
    rng = np.random.default_rng(SEED)
    filler = [i for i, ids in enumerate(label_ids) if not ids]
    if not filler:
        raise UserError("--tails needs samples without labels; there are none")
    result = []
    for text, ids, length in zip(texts, label_ids, lengths):
        if not ids or length > room:
            continue
        front, filled = "", 0
        while filled < room:
            i = rng.choice(filler)
            front, filled = front + texts[i], filled + lengths[i]
        result.append((front + text, ids))
    return zip(*result)


def measure(forward, tokenizer, info, args, texts, label_ids):
    """Yields a row of figures for each mode."""
    for long_text in ("truncate", "window"):
        for part in (texts[:WARM_UP], texts):
            start = time.perf_counter()
            encoded, _ = utils.encode(part, tokenizer, args.max_seq_length, long_text)
            logits = utils.logits_of(forward, encoded, args.batch_size, len(info.labels))
            seconds = time.perf_counter() - start
        counts = metric.MultiLabelCounts(len(info.labels))
        decisions = metric.decode(metric.probabilities(logits), **info.rule)
        counts.update(decisions, utils.multi_hot(label_ids, len(info.labels)))
        micro = counts.report(info.labels)["micro"]
        yield {
            "long_text": long_text,
            "texts": len(texts),
            "windows": len(encoded),
            "micro_f1": round(100 * counts.micro_f1, 2),
            "macro_f1": round(100 * counts.macro_f1, 2),
            "micro_precision": round(100 * micro["precision"], 2),
            "micro_recall": round(100 * micro["recall"], 2),
            "labels_per_text": round(float(decisions.sum()) / len(texts), 2),
            "gold_labels_per_text": round(sum(map(len, label_ids)) / len(texts), 2),
            "texts_per_second": round(len(texts) / seconds, 1),
        }


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    params_path = args.params_path or train_tiny(data, Path(args.work_dir))
    forward, info = load_forward(params_path, "cpu")
    args.max_seq_length = args.max_seq_length or info.max_seq_length
    utils.check_length(args.max_seq_length, info.max_position)
    tokenizer = utils.load_tokenizer(params_path)
    texts, label_ids = utils.read_examples(data / args.dev_file, info.labels)
    room = args.max_seq_length - 2
    lengths = [len(ids) - 2 for ids in utils.encode(texts, tokenizer, sys.maxsize)[0]]
    if args.tails:
        texts, label_ids = tail_set(texts, label_ids, lengths, room)
    else:
        rows = [row for row in zip(texts, label_ids, lengths) if row[2] > room]
        if not rows:
            raise UserError(f"{data / args.dev_file}: no text is longer than max_seq_length")
        texts, label_ids, _ = zip(*rows)
    for row in measure(forward, tokenizer, info, args, texts, label_ids):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    utils.cli(main)
