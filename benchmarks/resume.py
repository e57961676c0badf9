"""Kills a training with SIGKILL at random moments, resumes it, compares the final weights.

python benchmarks/resume.py --dataset_dir data --model_name tiny_ernie --kills 10
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

import utils

FLAGS = "--device cpu --logging_steps 1 --learning_rate 1e-3 --warmup".split()  # of train.py


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    add("--model_name", required=True, help="as for train.py")
    add("--epochs", type=utils.at_least(1), default=3, help="as for train.py")
    add("--save_steps", type=utils.at_least(0), default=5, help="as for train.py")
    add("--kills", type=utils.at_least(1), default=10, help="number of SIGKILLs")
    add("--spread", type=utils.at_least(0.0), default=0.5, help="seconds a kill may come later")
    add("--seed", type=int, default=3, help="seed of the moments")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    moments = random.Random(args.seed)
    flags = {"model_name": args.model_name, "epochs": args.epochs, "save_steps": args.save_steps}
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, log = (Path(folder) / name for name in ("whole", "killed", "log"))
        common.train(args.dataset_dir, whole, *FLAGS, log=log, **flags)
        total = last_step(whole)
        if args.kills >= total:
            raise utils.UserError(f"--kills {args.kills}: the training has only {total} steps")
        steps = sorted(moments.sample(range(1, total), args.kills))
        data = {"dataset_dir": args.dataset_dir, "save_dir": killed, "resume": True}
        command = [sys.executable, *common.argv(common.TRAIN, *FLAGS, **data, **flags)]
        for kill, step in enumerate(steps, 1):
            with open(log, "ab") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file)
            while last_step(killed) < step and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, args.spread))  # into a step, an evaluation or a save
            if process.poll() is not None:
                raise utils.UserError(f"ended before kill {kill}: give a smaller --spread")
            process.kill()
            process.wait()
            print(f"SIGKILL {kill} at step {last_step(killed)}", file=sys.stderr, flush=True)
        common.train(args.dataset_dir, killed, *FLAGS, log=log, **flags)
        same_weights, same_log = (
            (whole / name).read_bytes() == (killed / name).read_bytes()
            for name in (utils.WEIGHTS_FILE, "train_log.jsonl")
        )
    result = {"bit_identical_weights": same_weights, "same_log": same_log}
    common.print_row(killed_near_steps=steps, of_steps=total, **result)
    if not same_weights:
        sys.exit(1)


def last_step(save_dir):
    """The last step in the log of a run; what a kill left half-written does not count."""
    path = save_dir / "train_log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


if __name__ == "__main__":
    utils.cli(main)
