"""One training epoch with length-sorted batches against --batching random, same script, one run.

python benchmarks/batching.py --dataset_dir data --model_name tiny_ernie
"""

import json
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
    parser.add_argument("--device", default="cpu", help="as for train.py")
    return parser.parse_args(argv)


def epoch_seconds(args, batching, save_dir):
    """Wall time of a whole `train.py --epochs 1`: start, encoding, epoch, evaluation, saving."""
    command = [sys.executable, REPO / "train.py", "--epochs", "1", "--batching", batching]
    command += ["--device", args.device, "--dataset_dir", args.dataset_dir]
    command += ["--model_name", args.model_name, "--save_dir", save_dir, "--logging_steps", "100"]
    start = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True)
    return time.perf_counter() - start


def main(argv=None):
    args = parse_args(argv)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for batching in ("sorted", "random"):
            seconds[batching] = epoch_seconds(args, batching, Path(folder) / batching)
    ratio = seconds["sorted"] / seconds["random"]
    rounded = {f"{name}_seconds": round(value, 1) for name, value in seconds.items()}
    print(json.dumps({**rounded, "sorted_over_random": round(ratio, 3)}))


if __name__ == "__main__":
    utils.cli(main)
