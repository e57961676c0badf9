"""Texts per second of predict.py's pipeline against a plain dygraph loop, and whether labels agree.

    python benchmarks/predict_speed.py --dataset_dir data --params_path checkpoint

The plain loop is what the original application does: PaddleNLP's Python tokenizer, batches in file
order padded to their longest text, dygraph forward. Both sides tokenise, run on the CPU and are
timed after a warm-up of one batch; loading the model is not counted.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from paddlenlp.transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metric  # noqa: E402
import utils  # noqa: E402
from export_model import load_checkpoint  # noqa: E402
from predict import dygraph_forward, load_forward, set_device  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset_dir", required=True, help="folder of the data file")
    parser.add_argument(
        "--data_file", default="dev.txt", help="texts; only the first column counts"
    )
    parser.add_argument("--params_path", required=True, help="checkpoint folder")
    parser.add_argument("--batch_size", type=utils.at_least(1), default=32, help="texts per batch")
    parser.add_argument(
        "--default_math", action="store_true", help="plain loop on Paddle's defaults"
    )
    return parser.parse_args(argv)


def plain_loop(texts, forward, tokenizer, max_seq_length, batch_size):
    rows = []
    for chunk in utils.chunks(texts, batch_size):
        encoded = [tokenizer(text, max_length=max_seq_length, truncation=True) for text in chunk]
        rows.append(forward(**utils.pad([e["input_ids"] for e in encoded])))
    return np.concatenate(rows)


def pipeline(texts, forward, tokenizer, max_seq_length, batch_size, num_labels):
    encoded, _ = utils.encode(texts, tokenizer, max_seq_length)
    return utils.logits_of(forward, encoded, batch_size, num_labels)


def timed(function, texts, *rest):
    function(texts[:64], *rest)
    start = time.perf_counter()
    return function(texts, *rest), time.perf_counter() - start


def main(argv=None):
    args = parse_args(argv)
    if not args.default_math:  # give the plain loop the same matrix library settings
        set_device("cpu")
    lines = utils.read_texts(Path(args.dataset_dir) / args.data_file)
    texts = [line.split("\t")[0] for line in lines]
    model, info = load_checkpoint(args.params_path)
    plain, plain_seconds = timed(
        plain_loop,
        texts,
        dygraph_forward(model),
        AutoTokenizer.from_pretrained(args.params_path),
        info.max_seq_length,
        args.batch_size,
    )
    forward, _ = load_forward(args.params_path, "cpu")
    fast, fast_seconds = timed(
        pipeline,
        texts,
        forward,
        utils.load_tokenizer(args.params_path),
        info.max_seq_length,
        args.batch_size,
        len(info.labels),
    )
    same = metric.decode(metric.probabilities(plain), info.thresholds) == metric.decode(
        metric.probabilities(fast), info.thresholds
    )
    result = {
        "texts": len(texts),
        "plain_texts_per_second": round(len(texts) / plain_seconds, 1),
        "pipeline_texts_per_second": round(len(texts) / fast_seconds, 1),
        "ratio": round(plain_seconds / fast_seconds, 2),
        "texts_with_other_labels": int(np.sum(~same.all(axis=1))),
        "largest_logit_difference": float(np.abs(plain - fast).max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    utils.cli(main)
