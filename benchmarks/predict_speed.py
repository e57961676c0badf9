"""Texts per second of predict.py's pipeline against a plain dygraph loop, and whether labels agree.

    python benchmarks/predict_speed.py --dataset_dir data --params_path checkpoint

The plain loop is what the original application does: PaddleNLP's Python tokenizer, batches in file
order padded to their longest text, dygraph forward; once as Paddle comes, once with the settings
of model.set_device. Every side has a process of its own (the matrix library reads settings once),
tokenises, runs on the CPU and is timed after a warm-up of 64 texts; loading is not counted.
"""

import time

import common
import numpy as np

import metric
import utils

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")

WARM_UP = 64  # texts


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder of the data file")
    add("--data_file", default="dev.txt", help="texts; only the first column counts")
    add("--params_path", required=True, help="checkpoint folder")
    add("--batch_size", type=utils.at_least(1), default=32, help="texts per batch")
    return parser.parse_args(argv)


class PlainLoop(utils.Labeller):
    """PaddleNLP's tokenizer and batches in file order."""

    def logits(self, texts):
        rows, settings = [], {"max_length": self.info.max_seq_length, "truncation": True}
        for chunk in utils.chunks(texts, self.batch_size):
            sequences = [self.tokenizer(text, **settings)["input_ids"] for text in chunk]
            rows.append(self.forward(**utils.pad(sequences)))
        return np.concatenate(rows)


def plain_loop(args, side):
    if side == "plain":
        paddle.set_device("cpu")
    else:
        model.set_device("cpu")
    net, info = model.load_checkpoint(args.params_path)
    tokenizer = model.transformers.AutoTokenizer.from_pretrained(args.params_path)
    return PlainLoop(model.dygraph_forward(net), tokenizer, info, args.batch_size)


def measure(args, side):
    """Returns (texts per second, logits, decisions) of one side."""
    texts = common.read_first_column(args.dataset_dir, args.data_file)
    if side == "pipeline":
        labeller = model.load_labeller(args.params_path, "cpu", batch_size=args.batch_size)
    else:
        labeller = plain_loop(args, side)
    labeller.logits(texts[:WARM_UP])
    start = time.perf_counter()
    logits = labeller.logits(texts)
    seconds = time.perf_counter() - start
    decisions = metric.decode(metric.probabilities(logits), **labeller.info.rule)
    return len(texts) / seconds, logits, decisions


def main(argv=None):
    args = parse_args(argv)
    sides = "plain", "plain_tuned", "pipeline"
    plain, tuned, pipeline = (common.in_new_process(measure, args, side) for side in sides)
    common.print_row(
        plain_texts_per_second=plain[0],
        plain_tuned_texts_per_second=tuned[0],
        pipeline_texts_per_second=pipeline[0],
        ratio_to_plain=pipeline[0] / plain[0],
        ratio_to_plain_tuned=pipeline[0] / tuned[0],
        texts_with_other_labels=int((plain[2] != pipeline[2]).any(axis=1).sum()),
        largest_logit_difference=float(np.abs(plain[1] - pipeline[1]).max()),
        processor=utils.processor(),
    )


if __name__ == "__main__":
    utils.cli(main)
