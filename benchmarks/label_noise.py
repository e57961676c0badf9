"""How many wrong labels does analysis/dirty.py find, and what is cleaning worth?

    python benchmarks/label_noise.py --dataset_dir data --strategies tfidf

A share of the training samples gets wrong labels: the label set of another sample (set), one label
less (drop) or one more, more often a frequent one (add). Each strategy then names as many suspects
as there are such samples: precision and recall are equal, and random picking finds the share. A
classifier is trained on the clean data, on the noisy data and on the noisy data without the
suspects. Samples that were wrong from the start count as false alarms.
"""

import shlex
import statistics
from pathlib import Path

import baseline
import common
import dirty
import numpy as np

import utils


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    add("--work_dir", default="label_noise", help="for data and models; finished ones are reused")
    add("--noise", type=utils.at_least(0.0), default=0.1, help="share of samples made wrong")
    add("--kind", choices=["set", "drop", "add"], default="set", help="what is wrong with them")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of the noise")
    add("--strategies", nargs="+", choices=dirty.STRATEGIES, default=["tfidf"], help="to compare")
    add("--retrain", choices=["svm", "finetune"], default="svm", help="train.py or TF-IDF + SVM")
    add("--folds", type=utils.at_least(2), default=5, help="folds of tfidf and finetune")
    add("--device", default="cpu", help="of train.py")
    add("--train_args", type=shlex.split, default="", help="flags for train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    work = Path(args.work_dir).resolve()
    labels, (texts, label_ids) = common.read_data(args.dataset_dir, "train.txt")
    work.mkdir(parents=True, exist_ok=True)
    clean = retrain(args, args.dataset_dir, "train.txt", work / "clean")
    common.print_row(train="clean", **clean)
    found, gained = ({strategy: [] for strategy in args.strategies} for _ in range(2))
    lost = []
    for seed in args.seeds:
        folder = work / str(seed)
        noisy_ids, chosen = inject_noise(label_ids, args.noise, args.kind, seed)
        common.write_data(folder, args.dataset_dir, texts, noisy_ids, labels)
        noisy = retrain(args, folder, "train.txt", folder / "checkpoint")
        common.print_row(train="noisy", seed=seed, **noisy)
        lost.append(clean["macro_f1"] - noisy["macro_f1"])
        wrong = {(texts[i], *noisy_ids[i]) for i in chosen}
        for strategy in args.strategies:
            find_suspects(args, strategy, folder, len(chosen))
            suspects = zip(*utils.read_examples(folder / f"dirty_{strategy}.txt", labels))
            hits = sum((text, *ids) in wrong for text, ids in suspects)
            rest = f"rest_{strategy}.txt"
            cleaned = retrain(args, folder, rest, folder / f"cleaned_{strategy}")
            share = hits / len(chosen)
            found[strategy].append(share)
            gained[strategy].append(cleaned["macro_f1"] - noisy["macro_f1"])
            row = {"precision_and_recall": share, "times_random": share / args.noise, **cleaned}
            common.print_row(train=f"noisy without {strategy}'s suspects", seed=seed, **row)
    summary = {
        strategy: {
            "precision_and_recall": statistics.mean(found[strategy]),
            # Of the means: a single run may lose next to nothing.
            "lost_macro_f1_recovered": sum(gained[strategy]) / sum(lost),
        }
        for strategy in args.strategies
    }
    common.print_row(mean=summary, seeds=args.seeds)


def retrain(args, dataset_dir, train_file, save_dir):
    """F1s on dev, in percent, of a new classifier; a finished train.py in save_dir is reused."""
    if args.retrain == "finetune":
        return finetune(args, dataset_dir, train_file, save_dir)
    return common.f1_percent(baseline.evaluate(dataset_dir, train_file))


def finetune(args, dataset_dir, train_file, save_dir):
    flags = {"train_file": train_file, "device": args.device}
    return common.train(dataset_dir, save_dir, *args.train_args, **flags)


def inject_noise(label_ids, share, kind, seed):
    """Returns (label ids with wrong ones, indices of the samples that have them)."""
    if len({frozenset(ids) for ids in label_ids}) < 2:
        raise utils.UserError("all samples have the same labels; there are no others to give them")
    rng = np.random.default_rng(seed)
    everything = set().union(*label_ids)
    can_change = {"set": lambda ids: True, "drop": bool, "add": lambda ids: set(ids) < everything}
    candidates = np.flatnonzero([can_change[kind](ids) for ids in label_ids])
    size = min(round(share * len(label_ids)), len(candidates))
    chosen = np.sort(rng.choice(candidates, size, replace=False))
    noisy = [list(ids) for ids in label_ids]
    for i in chosen:
        if kind == "drop":
            noisy[i].pop(rng.integers(len(noisy[i])))
        while set(noisy[i]) == set(label_ids[i]):
            noisy[i] = list(label_ids[rng.integers(len(label_ids))])
            if kind == "add":
                extra = list(rng.permutation(noisy[i]))[:1]
                noisy[i] = [*label_ids[i], *(c for c in extra if c not in label_ids[i])]
    return noisy, chosen


def find_suspects(args, strategy, folder, dirty_num):
    """Runs dirty.py as a user does; it writes dirty_<strategy>.txt and rest_<strategy>.txt."""
    flags = {"dataset_dir": folder, "strategy": strategy, "dirty_num": dirty_num}
    flags |= {"dirty_file": f"dirty_{strategy}.txt", "rest_file": f"rest_{strategy}.txt"}
    flags |= {"folds": args.folds, "device": args.device}
    if strategy == "trustai":
        finetune(args, folder, "train.txt", folder / "checkpoint")
        flags["params_path"] = folder / "checkpoint"
    if strategy == "finetune":
        flags |= {"folds_dir": folder / "folds", "train_args": shlex.join(args.train_args)}
    dirty.main(common.argv(**flags))


if __name__ == "__main__":
    utils.cli(main)
