"""Accuracy, size and speed of several bundles in fp32 and int8, side by side in one run.

    python benchmarks/bundles.py --dataset_dir data \
        --model_path_prefix export/float32 prune/0.6666666666666666/float32

The bundles take turns with passes over the dev set, so that a busy machine slows all of them; the
ratios are to the first bundle in the same precision. Tokenisation and warm-up are not counted.
"""

from pathlib import Path

import common
import numpy as np
from predictor import Predictor

import utils

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
    settings = {"num_threads": args.num_threads, "batch_size": args.batch_size}
    predictors = {
        (prefix, precision): Predictor(prefix, precision=precision, **settings)
        for prefix in args.model_path_prefix
        for precision in ("fp32", "int8")
    }
    for predictor in predictors.values():
        predictor.forward = common.Stopwatch(predictor.forward)
    dev_file = Path(args.dataset_dir) / "dev.txt"
    texts, label_ids = utils.read_examples(dev_file, predictor.info.labels)
    decisions = {}
    for _ in range(PASSES):
        for key, predictor in predictors.items():
            times = predictor.forward.times
            counted = len(times)
            predictor.logits(texts[: WARM_UP * args.batch_size])
            del times[counted:]
            decisions[key], _ = predictor.decide(texts)
    for (prefix, precision), predictor in predictors.items():
        times = predictor.forward.times
        first = predictors[args.model_path_prefix[0], precision].forward.times
        file = Path(prefix).parent / utils.ONNX_FILES[precision]
        common.print_row(
            bundle=prefix,
            precision=precision,
            **common.f1_percent(common.count(decisions[prefix, precision], label_ids)),
            megabytes=file.stat().st_size / 1e6,
            texts_per_second=PASSES * len(texts) / sum(times),
            p50_ms=1000 * float(np.percentile(times, 50)),
            times_first=sum(first) / sum(times),
            processor=utils.processor(),
        )


if __name__ == "__main__":
    utils.cli(main)
