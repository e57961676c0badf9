"""Kills a training with SIGKILL at random moments, resumes it, compares the final weights.

python benchmarks/resume.py --dataset_dir data --model_name tiny_ernie --kills 10
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import utils  # noqa: E402


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    parser.add_argument("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    parser.add_argument("--model_name", required=True, help="as for train.py")
    parser.add_argument("--epochs", type=utils.at_least(1), default=3, help="as for train.py")
    parser.add_argument("--save_steps", type=utils.at_least(0), default=5, help="as for train.py")
    parser.add_argument("--kills", type=utils.at_least(1), default=10, help="number of SIGKILLs")
    parser.add_argument("--spread", type=float, default=0.5, help="seconds a kill may come later")
    parser.add_argument("--seed", type=int, default=3, help="seed of the moments")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        log = open(Path(folder) / "log", "w")

        def start(save_dir, *extra):
            command = [sys.executable, REPO / "train.py", "--device", "cpu", "--warmup"]
            command += ["--dataset_dir", args.dataset_dir, "--model_name", args.model_name]
            command += ["--epochs", args.epochs, "--save_steps", args.save_steps, *extra]
            command += ["--logging_steps", "1", "--learning_rate", "1e-3"]
            command += ["--save_dir", Path(folder) / save_dir]
            return subprocess.Popen([str(c) for c in command], stderr=log, stdout=log)

        def step_of(save_dir):
            """The last step in the log of a run; what a kill left half-written does not count."""
            path = Path(folder) / save_dir / "train_log.jsonl"
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            return json.loads(lines[-1])["step"] if lines else 0

        if start("whole").wait() != 0:
            raise utils.UserError(
                "the undisturbed run failed: " + (Path(folder) / "log").read_text()
            )
        total = step_of("whole")
        targets = sorted(moments.sample(range(1, total), args.kills))
        for number, target in enumerate(targets, 1):
            process = start("killed", "--resume")
            while step_of("killed") < target and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, args.spread))  # into a step, an evaluation or a save
            if process.poll() is not None:
                raise utils.UserError(f"ended before kill {number}: give a smaller --spread")
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"SIGKILL {number} at step {step_of('killed')}", file=sys.stderr, flush=True)
        if start("killed", "--resume").wait() != 0:
            raise utils.UserError("the last resume failed: " + (Path(folder) / "log").read_text())
        weights = [
            utils.load_weights(Path(folder) / name / utils.WEIGHTS_FILE)
            for name in ("whole", "killed")
        ]
        same = weights[0].keys() == weights[1].keys() and all(
            weights[0][key].tobytes() == weights[1][key].tobytes() for key in weights[0]
        )
        logs = [(Path(folder) / n / "train_log.jsonl").read_text() for n in ("whole", "killed")]
        log.close()
    result = {
        "killed_near_steps": targets,
        "of_steps": total,
        "bit_identical_weights": same,
        "same_log": logs[0] == logs[1],
    }
    print(json.dumps(result))
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    utils.cli(main)
