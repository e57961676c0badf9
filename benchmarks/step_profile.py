"""Where a training step of train.py spends its time, operator by operator.

    python benchmarks/step_profile.py --dataset_dir data --model_name tiny_ernie

Runs train.py's main on the CPU under paddle.profiler and prints the milliseconds of all threads
together per step, forward and backward apart, the longest first. The rest of "all" is NumPy and
Python. With --repo the train.py of another checkout runs, for before and after.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import common

import utils

WARM_UP = 3  # steps before the profile


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train.txt and label.txt")
    add("--model_name", required=True, help="model folder; its shape counts, not its weights")
    add("--repo", help="checkout whose train.py runs; None: this one")
    add("--steps", type=utils.at_least(1), default=20, help="steps that are profiled")
    add("--rows", type=utils.at_least(1), default=20, help="operators that are printed")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as data:
        num_texts = 32 * (WARM_UP + args.steps)
        labels, (texts, label_ids) = common.read_data(args.dataset_dir, "train.txt")
        for file, size in (("train.txt", num_texts), ("dev.txt", 1)):
            common.write_examples(Path(data) / file, texts[:size], label_ids[:size], labels)
        shutil.copy(Path(args.dataset_dir) / "label.txt", data)
        seconds, times = common.in_new_process(profile, args, data)
    print(f"Processor: {utils.processor()}")
    common.print_row(operator="all", wall_ms=1000 * seconds)
    for name, (calls, milliseconds) in list(times.items())[: args.rows]:
        common.print_row(operator=name, ms=milliseconds, calls=calls)


def profile(args, data):
    """(seconds, {operator: (calls, CPU milliseconds)}), both per step, without the warm-up."""
    if args.repo:
        for name in ("utils", "metric"):
            sys.modules.pop(name, None)
        sys.path.insert(0, args.repo)
    import train

    plain_step, moments = train.Trainer.train_step, []

    def step(*arguments):
        from paddle.profiler import Profiler, ProfilerTarget

        if len(moments) == WARM_UP:
            step.profiler = Profiler(targets=[ProfilerTarget.CPU], on_trace_ready=lambda _: None)
            step.profiler.start()
        moments.append(time.perf_counter())
        result = plain_step(*arguments)
        if len(moments) == WARM_UP + args.steps:
            moments.append(time.perf_counter())
            step.profiler.stop()
        return result

    train.Trainer.train_step = step
    with tempfile.TemporaryDirectory() as folder:
        flags = {"dataset_dir": data, "model_name": args.model_name, "save_dir": folder}
        train.main(common.argv(device="cpu", epochs=1, **flags))
    from paddle.profiler.profiler_statistic import StatisticData

    result = step.profiler.profiler_result
    items = StatisticData(result.get_data(), result.get_extra_info()).event_summary.items
    # A PyLayer only calls operators that are counted by themselves.
    times = {
        name: (item.call / args.steps, item.cpu_time / 1e6 / args.steps)
        for name, item in items.items()
        if "PyLayer" not in name
    }
    times = dict(sorted(times.items(), key=lambda pair: -pair[1][1]))
    return (moments[-1] - moments[WARM_UP]) / args.steps, times


if __name__ == "__main__":
    utils.cli(main)
