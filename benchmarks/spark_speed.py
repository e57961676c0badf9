"""Texts per second of deploy/spark/label.py against infer.py, on the same cores in one run.

    taskset -c 0 python benchmarks/spark_speed.py --model_path_prefix export/float32 \
        --dataset_dir data

Run it with a Python that has deploy/spark/requirements.txt. Both sides label the texts a few times
over, take turns, and use the same number of cores: Spark in its local mode, one task a core. The
time that each needs for a tenth of the texts is taken off, since Spark and Python start once, for a
hundred million texts as well.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import common

import utils

SIDES = "label.py", "infer.py"


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--model_path_prefix", required=True, help="a bundle's static graph, without suffix")
    add("--dataset_dir", required=True, help="folder of the data file")
    add("--data_file", default="dev.txt", help="texts; only the first column counts")
    add("--use_quantize", action="store_true", help="dynamic int8")
    add("--num_threads", type=utils.at_least(1), default=utils.num_cores(), help="cores of a side")
    add("--copies", type=utils.at_least(1), default=10, help="of the texts in the longer run")
    add("--rounds", type=utils.at_least(1), default=3, help="turns of each side; medians count")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    texts = common.read_first_column(args.dataset_dir, args.data_file)
    sizes = max(1, len(texts) * args.copies // 10), len(texts) * args.copies
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            lines = (texts * args.copies)[:size]
            (Path(folder) / f"{size}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rounds = [
            {side: [seconds(side, args, folder, size) for size in sizes] for side in SIDES}
            for _ in range(args.rounds)
        ]
    rates = {
        side: sorted((sizes[1] - sizes[0]) / (r[side][1] - r[side][0]) for r in rounds)
        for side in SIDES
    }
    medians = {side: values[len(values) // 2] for side, values in rates.items()}
    common.print_row(
        cores=args.num_threads,
        texts=sizes[1],
        precision="int8" if args.use_quantize else "fp32",
        texts_per_second=medians,
        all_rounds=rates,
        spark_over_infer=medians["label.py"] / medians["infer.py"],
        hours_for_1e9_texts_on_100_cores=1e7 * args.num_threads / medians["label.py"] / 3600,
        processor=utils.processor(),
    )


def seconds(side, args, folder, size):
    """Of one run of a script from its start to its end."""
    flags = {"model_path_prefix": args.model_path_prefix, "use_quantize": args.use_quantize or None}
    if side == "label.py":
        script = common.REPO / "deploy" / "spark" / "label.py"
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ["PYSPARK_SUBMIT_ARGS"] = f"--master local[{args.num_threads}] pyspark-shell"
        flags |= {"input": f"{folder}/{size}.txt", "output": f"{folder}/out", "overwrite": True}
    else:
        script = common.REPO / "deploy" / "predictor" / "infer.py"
        flags |= {"dataset_dir": folder, "data_file": f"{size}.txt", "device": "cpu"}
        flags |= {"output_file": f"{folder}/out.txt", "num_threads": args.num_threads}
    start = time.perf_counter()
    common.run(script, log=f"{folder}/log", **flags)
    return time.perf_counter() - start


if __name__ == "__main__":
    utils.cli(main)
