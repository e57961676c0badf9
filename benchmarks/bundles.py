"""Accuracy, size and speed of several bundles in fp32 and int8, side by side in one run.

    python benchmarks/bundles.py --dataset_dir data \
        --model_path_prefix export/float32 prune/0.6666666666666666/float32

The bundles take turns with passes over the dev set, so that a busy machine slows all of them; the
ratios are to the first bundle in the same precision. Tokenisation and warm-up are not counted.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "deploy" / "predictor")]
from predictor import Predictor  # noqa: E402

import metric  # noqa: E402
import utils  # noqa: E402

PASSES = 3
WARM_UP = 3  # batches before each pass: the caches hold another bundle's weights


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--model_path_prefix", required=True, nargs="+", help="static graphs, the teacher's first")
    add("--dataset_dir", required=True, help="folder of dev.txt")
    add("--batch_size", type=utils.at_least(1), default=32, help="texts per batch")
    add("--num_threads", type=utils.at_least(1), default=utils.num_cores(), help="CPU threads")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    flags = {"num_threads": args.num_threads, "batch_size": args.batch_size}
    sides = {
        (prefix, precision): Predictor(prefix, precision=precision, **flags)
        for prefix in args.model_path_prefix
        for precision in ("fp32", "int8")
    }
    first = next(iter(sides.values()))
    labels = first.info.labels
    texts, label_ids = utils.read_examples(Path(args.dataset_dir) / "dev.txt", labels)
    encoded, _ = first.encode(texts)
    plan = utils.batches([len(ids) for ids in encoded], args.batch_size)
    seconds = {side: [] for side in sides}
    logits = {side: np.empty((len(texts), len(labels)), np.float32) for side in sides}
    for _ in range(PASSES):
        for side, predictor in sides.items():
            for number, index in enumerate([*plan[:WARM_UP], *plan]):
                batch = utils.pad([encoded[i] for i in index])
                start = time.perf_counter()
                logits[side][index] = predictor.forward(**batch)
                if number >= WARM_UP:
                    seconds[side].append(time.perf_counter() - start)
    targets = utils.multi_hot(label_ids, len(labels))
    for (prefix, precision), times in seconds.items():
        predictor = sides[prefix, precision]
        counts = metric.MultiLabelCounts(len(labels))
        probs = metric.probabilities(logits[prefix, precision])
        counts.update(metric.decode(probs, **predictor.info.rule), targets)
        file = Path(prefix).parent / utils.ONNX_FILES[precision]
        row = {
            "bundle": str(prefix),
            "precision": precision,
            "micro_f1": round(100 * counts.micro_f1, 2),
            "macro_f1": round(100 * counts.macro_f1, 2),
            "megabytes": round(file.stat().st_size / 1e6, 1),
            "texts_per_second": round(PASSES * len(texts) / sum(times), 1),
            "p50_ms": round(1000 * float(np.percentile(times, 50)), 1),
            "times_first": round(
                sum(seconds[args.model_path_prefix[0], precision]) / sum(times), 2
            ),
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    utils.cli(main)
