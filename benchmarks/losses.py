"""Macro F1 of the mission's recipe against other losses and tuned thresholds, over several seeds.

    python benchmarks/losses.py --dataset_dir data --model_name tiny_ernie --work_dir losses \
        --train_flags "--epochs 6 --learning_rate 1e-3 --warmup --warmup_steps 100 --dropout 0"

All recipes start from the same weights. Thresholds are tuned on dev and judged out of sample (see
analysis/evaluate.py). Finished runs in --work_dir are kept: the same command goes on after a stop.
"""

import json
import shlex
import statistics
import sys
from pathlib import Path

import common

import utils

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
    add("--train_flags", type=shlex.split, default="", help="flags of train.py for all recipes")
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="losses to try")
    add("--seeds", nargs="+", type=utils.at_least(0), default=[1, 2, 3], help="seeds of train.py")
    add("--device", type=str.lower, default="cpu", help="as for train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    results = {}  # (recipe, rule): [F1s of each seed]
    for seed in args.seeds:
        for recipe in args.recipes:
            for rule, f1s in run_recipe(args, recipe, seed).items():
                results.setdefault((recipe, rule), []).append(f1s)
                print(f"seed {seed} {recipe}, {rule}: {common.rounded(f1s)}", file=sys.stderr)
    for (recipe, rule), seeds in results.items():
        row = {"loss": recipe, "rule": rule}
        for name in common.F1S:
            row[name] = summary([f1s[name] for f1s in seeds])
            if BASELINE in results and (recipe, rule) != BASELINE:
                pairs = zip(seeds, results[BASELINE])
                row[f"{name}_gain"] = summary([f1s[name] - base[name] for f1s, base in pairs])
        common.print_row(**row)


def run_recipe(args, recipe, seed):
    """Trains unless it is done already; returns {decision rule: F1s on dev in percent}."""
    folder = Path(args.work_dir) / f"{recipe}_{seed}"
    log, report_path = folder.with_suffix(".log"), folder.with_suffix(".json")
    words = [*args.train_flags, *RECIPES[recipe]]
    flags = {"model_name": args.model_name, "seed": seed, "device": args.device}
    common.train(args.dataset_dir, folder, *words, log=log, **flags)
    result = {}
    for target in ("macro_f1", "both"):
        command = [common.REPO / "analysis" / "evaluate.py", "--skip_train", "--tune_thresholds"]
        flags = {"device": args.device, "dataset_dir": args.dataset_dir, "params_path": folder}
        flags |= {"json_path": report_path, "bad_case_path": folder.with_suffix(".txt")}
        common.run(*command, tune_for=target, log=log, **flags)
        report = json.loads(report_path.read_text(encoding="utf-8"))
        tuned = report["tuned"]["out_of_sample"]
        rules = {"threshold 0.5": report["dev"], f"tuned for {target}": tuned}
        for rule, figures in rules.items():
            result[rule] = {f"{name}_f1": 100 * figures[name]["f1"] for name in ("micro", "macro")}
    return result


def summary(values):
    return {"mean": statistics.mean(values), "seeds": values}


if __name__ == "__main__":
    utils.cli(main)
