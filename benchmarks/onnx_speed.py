"""Texts per second of the ONNX Runtime predictor against the whole set padded to its longest text.

    python benchmarks/onnx_speed.py --model_path_prefix export/float32 --dataset_dir data
    python benchmarks/onnx_speed.py --shape medium --vocab_file vocab.txt --dataset_dir data

The second form measures a model of random weights. The sides take turns on the same tenth of the
texts, so that a busy machine slows all of them; tokenisation is not counted. The ceiling is the
best float32 matrix product of NumPy (2048 x 2048, all threads) seen in the same run.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "data"), str(REPO / "deploy" / "predictor")]
import utils  # noqa: E402

TURNS = 10


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_path_prefix", help="a bundle's static graph, without suffix")
    model.add_argument("--shape", help="random weights of this shape (see data/init_model.py)")
    add("--vocab_file", help="vocabulary of --shape; None: made from --dataset_dir")
    add("--dataset_dir", required=True, help="folder of the data and label files")
    add("--data_file", default="dev.txt", help="texts; only the first column counts")
    add("--max_seq_length", type=utils.at_least(3), default=128, help="longest sequence of --shape")
    add("--batch_size", type=utils.at_least(1), default=32, help="texts per batch")
    add("--num_threads", type=utils.at_least(1), default=utils.num_cores(), help="threads")
    return parser.parse_args(argv)


def random_bundle(args, folder):
    """Exports a model of random weights; returns the prefix of its static graph."""
    import init_model

    import export_model
    import train

    model_dir, checkpoint, bundle = (folder / name for name in ("model", "checkpoint", "export"))
    vocab = ["--vocab_file", args.vocab_file] if args.vocab_file else []
    vocab = vocab or ["--dataset_dir", args.dataset_dir]
    init_model.main(["--output_dir", str(model_dir), "--shape", args.shape, *vocab])
    labels = utils.read_labels(Path(args.dataset_dir) / "label.txt")
    model = export_model.load_folder(model_dir, labels)
    model.config.id2label = dict(enumerate(labels))
    model.config.max_seq_length = args.max_seq_length
    train.save_model(checkpoint, model, model_dir)
    export_model.main(["--params_path", str(checkpoint), "--output_path", str(bundle), "--onnx"])
    return bundle / export_model.PREFIX


def matmul_flops(config, batch, length):
    """Multiplications and additions of the encoder's matrix products for one padded batch."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    weights = 4 * hidden * hidden + 2 * hidden * inner
    per_token = 2 * weights + 4 * length * hidden  # + scores and weighted sum of the attention
    return config["num_hidden_layers"] * batch * length * per_token


def sgemm_flops_per_second(num_threads, size=2048):
    a = np.ones((size, size), dtype=np.float32)
    with threadpool_limits(num_threads):
        start = time.perf_counter()
        a @ a
        return 2 * size**3 / (time.perf_counter() - start)


def pad_to(sequences, length):
    batch = utils.pad([*sequences, np.zeros(length, dtype=np.int32)])
    return {name: array[:-1] for name, array in batch.items()}


def measure(args, prefix):
    from predictor import Predictor

    def predictor(precision, num_threads):
        flags = {"precision": precision, "num_threads": num_threads, "batch_size": args.batch_size}
        return Predictor(prefix, **flags)

    sides = {"padded fp32": (predictor("fp32", args.num_threads), True)}
    for precision in ("fp32", "int8"):
        sides[precision] = (predictor(precision, args.num_threads), False)
        sides[f"{precision}, 1 thread"] = (predictor(precision, 1), False)
    first = sides["fp32"][0]
    lines = utils.read_texts(Path(args.dataset_dir) / args.data_file)
    texts = [line.split("\t")[0] for line in lines]
    encoded, _ = first.encode(texts)
    lengths = [len(ids) for ids in encoded]
    plan = utils.batches(lengths, args.batch_size)
    seconds, ceiling = dict.fromkeys(sides, 0.0), 0.0
    for turn in range(TURNS):
        ceiling = max(ceiling, sgemm_flops_per_second(args.num_threads))
        for name, (side, padded) in sides.items():
            if turn == 0:
                side.predict(texts[: args.batch_size])  # warm-up
            for index in plan[turn::TURNS]:
                sequences = [encoded[i] for i in index]
                batch = pad_to(sequences, max(lengths)) if padded else utils.pad(sequences)
                start = time.perf_counter()
                side.forward(**batch)
                seconds[name] += time.perf_counter() - start
    config = utils.read_json(Path(prefix).parent / utils.CONFIG_FILE)
    flops = sum(matmul_flops(config, len(i), max(lengths[j] for j in i)) for i in plan)
    return {
        "texts": len(texts),
        "num_threads": args.num_threads,
        "texts_per_second": {name: round(len(texts) / s, 1) for name, s in seconds.items()},
        "fp32_over_padded": round(seconds["padded fp32"] / seconds["fp32"], 2),
        "int8_over_padded": round(seconds["padded fp32"] / seconds["int8"], 2),
        "fp32_threads_gain": round(seconds["fp32, 1 thread"] / seconds["fp32"], 2),
        "int8_threads_gain": round(seconds["int8, 1 thread"] / seconds["int8"], 2),
        "sgemm_gflops": round(ceiling / 1e9, 1),
        "fp32_share_of_sgemm": round(flops / seconds["fp32"] / ceiling, 2),
    }


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        prefix = args.model_path_prefix or random_bundle(args, Path(folder))
        print(json.dumps(measure(args, prefix), indent=1))


if __name__ == "__main__":
    utils.cli(main)
