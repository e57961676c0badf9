"""Texts per second of the ONNX Runtime predictor against the whole set padded to its longest text.

    python benchmarks/onnx_speed.py --model_path_prefix export/float32 --dataset_dir data
    python benchmarks/onnx_speed.py --shape medium --vocab_file vocab.txt --dataset_dir data

The second form measures a model of random weights. The sides take turns on the same tenth of the
texts, so that a busy machine slows all of them; tokenisation is not counted. The ceiling is the
best float32 matrix product of NumPy (2048 x 2048, all threads) seen in the same run. --device gpu:
the sides are fp32 and fp16 on the GPU, and fp32 on the CPU.
"""

import tempfile
import time
from pathlib import Path

import common
import init_model
import numpy as np
from predictor import Predictor
from threadpoolctl import threadpool_limits

import utils

model = utils.LazyModule("model")

TURNS = 10


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--model_path_prefix", help="a bundle's static graph, without suffix")
    add("--shape", choices=init_model.SHAPES, help="random weights of this shape")
    add = parser.add_argument
    add("--vocab_file", help="vocabulary of --shape; None: made from --dataset_dir")
    add("--dataset_dir", required=True, help="folder of the data and label files")
    add("--data_file", default="dev.txt", help="texts; only the first column counts")
    add("--max_seq_length", type=utils.at_least(3), default=128, help="longest sequence of --shape")
    add("--batch_size", type=utils.at_least(1), default=32, help="texts per batch")
    add("--num_threads", type=utils.at_least(1), default=utils.num_cores(), help="threads")
    add("--device", choices=["cpu", "gpu"], default="cpu", help="where the sides run")
    add("--device_id", type=utils.at_least(0), default=0, help="number of the GPU")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        common.print_row(**measure(args, args.model_path_prefix or random_bundle(args, folder)))


def random_bundle(args, folder):
    """Exports a model of random weights; returns the prefix of its static graph."""
    model_dir, checkpoint, bundle = (Path(folder) / n for n in ("model", "checkpoint", "export"))
    data = None if args.vocab_file else args.dataset_dir
    source = {"vocab_file": args.vocab_file, "dataset_dir": data}
    init_model.main(common.argv(output_dir=model_dir, shape=args.shape, **source))
    (labels,) = common.read_data(args.dataset_dir)
    net = model.load_folder(model_dir, labels)
    net.config.id2label = dict(enumerate(labels))
    net.config.max_seq_length = args.max_seq_length
    model.save_checkpoint(checkpoint, net, model_dir)
    script = common.REPO / "export_model.py"
    common.run(script, params_path=checkpoint, output_path=bundle, onnx=True)
    return bundle / model.PREFIX


def measure(args, prefix):
    """The figures as a dict; "padded" is fp32 on the device, too."""

    def predictor(device, precision, num_threads=args.num_threads):
        settings = {"device": device, "precision": precision, "num_threads": num_threads}
        settings |= {"device_id": args.device_id, "batch_size": args.batch_size}
        result = Predictor(prefix, **settings)
        result.forward = common.Stopwatch(result.forward)
        return result

    sides = {"padded fp32": predictor(args.device, "fp32"), "fp32": predictor(args.device, "fp32")}
    if args.device == "gpu":
        sides |= {"fp16": predictor("gpu", "fp16"), "CPU fp32": predictor("cpu", "fp32")}
    else:
        sides["int8"] = predictor("cpu", "int8")
        sides |= {f"{name}, 1 thread": predictor("cpu", name, 1) for name in ("fp32", "int8")}
    watches = {name: side.forward for name, side in sides.items()}
    texts = common.read_first_column(args.dataset_dir, args.data_file)
    lengths = [len(ids) for ids in sides["fp32"].encode(texts)]
    sides["padded fp32"].forward = padded(watches["padded fp32"], max(lengths))
    plan, ceiling = utils.batches(lengths, args.batch_size), 0.0
    # A GPU prepares each shape of a batch when it first meets it: its warm-up needs all of them.
    warm_up = texts if args.device == "gpu" else texts[: args.batch_size]
    for name, side in sides.items():
        side.predict(warm_up)
        watches[name].times, watches[name].shapes = [], []
    for turn in range(TURNS):
        ceiling = max(ceiling, sgemm_flops_per_second(args.num_threads))
        part = [texts[i] for indices in plan[turn::TURNS] for i in indices]
        for side in sides.values():
            side.logits(part)
    seconds = {name: sum(watch.times) for name, watch in watches.items()}
    config = utils.read_json(Path(prefix).parent / utils.CONFIG_FILE)
    flops = sum(matmul_flops(config, *shape) for shape in watches["fp32"].shapes)
    row = {
        "texts": len(texts),
        "batch_size": args.batch_size,
        "num_threads": args.num_threads,
        "texts_per_second": {name: len(texts) / s for name, s in seconds.items()},
        "fp32_over_padded": seconds["padded fp32"] / seconds["fp32"],
        "processor": utils.processor(),
    }
    if args.device == "gpu":
        row["fp16_over_fp32"] = seconds["fp32"] / seconds["fp16"]
        row["fp32_over_cpu"] = seconds["CPU fp32"] / seconds["fp32"]
        return row
    row["int8_over_padded"] = seconds["padded fp32"] / seconds["int8"]
    for name in ("fp32", "int8"):
        row[f"{name}_threads_gain"] = seconds[f"{name}, 1 thread"] / seconds[name]
    row["sgemm_gflops"] = ceiling / 1e9
    row["fp32_share_of_sgemm"] = flops / seconds["fp32"] / ceiling
    return row


def padded(forward, length):
    """The same forward with all batches padded to one length."""

    def longer(**batch):
        room = (0, 0), (0, length - batch["input_ids"].shape[1])
        return forward(**{name: np.pad(array, room) for name, array in batch.items()})

    return longer


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


if __name__ == "__main__":
    utils.cli(main)
