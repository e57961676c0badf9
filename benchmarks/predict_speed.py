"""Texts per second of predict.py's pipeline against a plain dygraph loop, and whether labels agree.

    python benchmarks/predict_speed.py --dataset_dir data --params_path checkpoint

The plain loop is what the original application does: PaddleNLP's Python tokenizer, batches in file
order padded to their longest text, dygraph forward; once as Paddle comes, once with the settings
of export_model.set_device. Every side has a process of its own (the matrix library reads settings
once), tokenises, runs on the CPU and is timed after a warm-up of 64 texts; loading is not counted.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from paddlenlp.transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metric  # noqa: E402
import utils  # noqa: E402
from export_model import dygraph_forward, load_checkpoint, set_device  # noqa: E402
from predict import load_forward  # noqa: E402

SIDES = ["plain", "plain_tuned", "pipeline"]


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    parser.add_argument("--dataset_dir", required=True, help="folder of the data file")
    parser.add_argument(
        "--data_file", default="dev.txt", help="texts; only the first column counts"
    )
    parser.add_argument("--params_path", required=True, help="checkpoint folder")
    parser.add_argument("--batch_size", type=utils.at_least(1), default=32, help="texts per batch")
    parser.add_argument("--side", choices=SIDES, help="measure one side only, for --logits")
    parser.add_argument("--logits", help="where one side puts its logits")
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


def measure(args):
    """Seconds of one side; its logits go to args.logits."""
    lines = utils.read_texts(Path(args.dataset_dir) / args.data_file)
    texts = [line.split("\t")[0] for line in lines]
    if args.side == "pipeline":
        forward, info = load_forward(args.params_path, "cpu")
        function, tokenizer = pipeline, utils.load_tokenizer(args.params_path)
        rest = [len(info.labels)]
    else:
        if args.side == "plain_tuned":
            set_device("cpu")
        model, info = load_checkpoint(args.params_path)
        forward, function, rest = dygraph_forward(model), plain_loop, []
        tokenizer = AutoTokenizer.from_pretrained(args.params_path)
    rest = [forward, tokenizer, info.max_seq_length, args.batch_size, *rest]
    logits, seconds = timed(function, texts, *rest)
    np.save(args.logits, logits)
    return len(texts), seconds


def main(argv=None):
    args = parse_args(argv)
    if args.side:
        print(json.dumps(measure(args)))
        return
    speed, logits = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            path = Path(folder) / f"{side}.npy"
            flags = ["--dataset_dir", args.dataset_dir, "--data_file", args.data_file]
            flags += ["--params_path", args.params_path, "--batch_size", args.batch_size]
            command = [sys.executable, __file__, *flags, "--side", side, "--logits", path]
            command = [str(part) for part in command]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            count, seconds = json.loads(run.stdout.splitlines()[-1])
            speed[side], logits[side] = count / seconds, np.load(path)
    rule = utils.read_model_info(args.params_path).rule
    decisions = {s: metric.decode(metric.probabilities(logits[s]), **rule) for s in SIDES}
    differ = (decisions["plain"] != decisions["pipeline"]).any(axis=1)
    result = {
        **{f"{side}_texts_per_second": round(value, 1) for side, value in speed.items()},
        "ratio_to_plain": round(speed["pipeline"] / speed["plain"], 2),
        "ratio_to_plain_tuned": round(speed["pipeline"] / speed["plain_tuned"], 2),
        "texts_with_other_labels": int(differ.sum()),
        "largest_logit_difference": float(np.abs(logits["plain"] - logits["pipeline"]).max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    utils.cli(main)
