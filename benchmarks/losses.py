"""Macro F1 of the mission's recipe against other losses and tuned thresholds, over several seeds.

    python benchmarks/losses.py --dataset_dir data --model_name tiny_ernie --work_dir losses \
        --train_flags "--epochs 6 --learning_rate 1e-3 --warmup --warmup_steps 100 --dropout 0"

All recipes start from the same weights. Thresholds are tuned on dev and judged out of sample (see
analysis/evaluate.py). Finished runs in --work_dir are kept: the same command goes on after a stop.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import utils  # noqa: E402

RECIPES = {
    "bce": [],
    "bce_pos_weight": ["--pos_weight", "auto"],
    "focal": ["--loss", "focal"],
    "focal_pos_weight": ["--loss", "focal", "--pos_weight", "auto"],
    "asl": ["--loss", "asl"],
    "asl_pos_weight": ["--loss", "asl", "--pos_weight", "auto"],
}
BASELINE = ("bce", "threshold 0.5")  # the mission's recipe


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    add("--model_name", required=True, help="as for train.py; a folder gives all the same start")
    add("--work_dir", required=True, help="folder of the checkpoints and reports")
    add("--train_flags", default="", help="further flags of train.py, for all recipes alike")
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="losses to try")
    add("--seeds", nargs="+", type=utils.at_least(0), default=[1, 2, 3], help="seeds of train.py")
    add("--device", type=str.lower, default="cpu", help="as for train.py")
    return parser.parse_args(argv)


def run(script, flags, log):
    command = [sys.executable, REPO / script, *flags]
    with open(log, "a", encoding="utf-8") as file:
        result = subprocess.run([str(c) for c in command], stdout=file, stderr=file)
    if result.returncode:
        raise utils.UserError(f"{script} failed; see {log}")


def train(args, recipe, seed):
    """The checkpoint of one recipe and seed; made unless it is there."""
    folder = Path(args.work_dir) / f"{recipe}_{seed}"
    common = ["--device", args.device, "--dataset_dir", args.dataset_dir]
    flags = [*common, "--model_name", args.model_name, "--save_dir", folder, "--seed", seed]
    flags += ["--resume", *args.train_flags.split(), *RECIPES[recipe]]
    run("train.py", flags, folder.with_suffix(".log"))
    return folder


def figures(args, folder):
    """{decision rule: (micro F1, macro F1)} in percent."""
    result, log = {}, folder.with_suffix(".log")
    for target in ("macro_f1", "both"):
        report = folder.with_suffix(".json")
        flags = ["--device", args.device, "--dataset_dir", args.dataset_dir, "--skip_train"]
        flags += ["--params_path", folder, "--json_path", report, "--tune_thresholds"]
        flags += ["--tune_for", target, "--bad_case_path", folder.with_suffix(".txt")]
        run("analysis/evaluate.py", flags, log)
        report = json.loads(report.read_text(encoding="utf-8"))
        parts = {"threshold 0.5": report["dev"], f"tuned for {target}": report["tuned"]}
        for rule, part in parts.items():
            part = part.get("out_of_sample", part)
            result[rule] = tuple(100 * part[average]["f1"] for average in ("micro", "macro"))
    return result


def summary(values):
    """Mean and every single value, rounded."""
    return {"mean": round(statistics.mean(values), 2), "seeds": [round(v, 2) for v in values]}


def main(argv=None):
    args = parse_args(argv)
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    found = {}  # (recipe, rule): [(micro F1, macro F1) of each seed]
    for seed in args.seeds:
        for recipe in args.recipes:
            for rule, pair in figures(args, train(args, recipe, seed)).items():
                found.setdefault((recipe, rule), []).append(pair)
                print(f"seed {seed} {recipe}, {rule}: {pair[0]:.2f} {pair[1]:.2f}", file=sys.stderr)
    for key, pairs in found.items():
        row = {"loss": key[0], "rule": key[1]}
        for i, name in enumerate(("micro_f1", "macro_f1")):
            row[name] = summary([pair[i] for pair in pairs])
            if BASELINE in found and key != BASELINE:
                gains = [pair[i] - base[i] for pair, base in zip(pairs, found[BASELINE])]
                row[f"{name}_gain"] = summary(gains)
        print(json.dumps(row))


if __name__ == "__main__":
    utils.cli(main)
