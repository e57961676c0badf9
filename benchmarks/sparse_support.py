"""What are support data for sparse dev texts, and augmented data, worth on a small training set?

    python benchmarks/sparse_support.py --dataset_dir data --num_train 500 --dict_dir word_lists \
        --train_args "--model_name ernie-3.0-nano-zh --epochs 20"

The experiments of the original's README. For each seed: a random part of the training set, train.py
on it, sparse.py with the trained model, train.py on the part with the support data. `annotate`
takes the support texts from the rest of the training set and gives them their labels; `random` does
so with as many random texts of the rest. `aug_*` adds aug.py's two new texts for each text instead.
A second classifier, TF-IDF with a linear SVM, is trained on the same files; with --svm_only it is
the only one (`random` and `aug_*` need no model).
"""

import shlex
import statistics
from pathlib import Path

import baseline
import common
import numpy as np
import sparse

import utils

aug = utils.LazyModule("aug")  # an import statement would be sorted before common's
AUGMENTED = tuple(f"aug_{strategy}" for strategy in ("mix", *aug.STRATEGIES))
KINDS = ("duplicate", *aug.STRATEGIES, "annotate", "random", *AUGMENTED)


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    add("--work_dir", default="sparse_support", help="for data and models; reused if finished")
    add("--num_train", type=utils.at_least(1), default=500, help="size of the part")
    add("--num", type=utils.at_least(1), default=100, help="--sparse_num and --support_num")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of the part")
    add("--kinds", nargs="+", choices=KINDS, default=["duplicate", "substitute"], help="to compare")
    add("--svm_only", action="store_true", help="do not run train.py")
    add("--dict_dir", help="word lists of aug.py")
    add("--device", default="cpu", help="of train.py and sparse.py")
    add("--train_args", type=shlex.split, default="", help="flags for train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.svm_only and not set(args.kinds) <= {"random", *AUGMENTED}:
        raise utils.UserError(
            "--svm_only: only 'random' and 'aug_*' can do without a trained model"
        )
    labels, (texts, label_ids), dev = common.read_data(args.dataset_dir, "train.txt", "dev.txt")
    results = {kind: [] for kind in ("base", *args.kinds)}
    for seed in args.seeds:
        folder = Path(args.work_dir).resolve() / str(seed)
        order = np.random.default_rng(seed).permutation(len(texts))
        part = [(texts[i], label_ids[i]) for i in order[: args.num_train]]
        known = {*dev[0], *(text for text, _ in part)}
        # sparse.py takes none of the known texts, too.
        rest = [(texts[i], label_ids[i]) for i in order[args.num_train :] if texts[i] not in known]
        common.write_data(folder, args.dataset_dir, *zip(*part), labels)
        for kind, rows in results.items():
            train_file = "train.txt"
            if kind != "base":
                train_file = f"train_{kind}.txt"
                examples = part + support(args, kind, folder, rest, labels)
                common.write_examples(folder / train_file, *zip(*examples), labels)
            rows.append(classify(args, folder, train_file, folder / kind))
            common.print_row(seed=seed, train=kind, **rows[-1])
    for kind, rows in results.items():
        summary = {"train": kind, "seeds": args.seeds}
        for name in rows[0]:
            values = [row[name] for row in rows]
            gains = [row[name] - base[name] for row, base in zip(rows, results["base"])]
            summary[name] = {
                "mean": statistics.mean(values),
                "std": deviation(values),
                "gain": statistics.mean(gains),
                "gain_std": deviation(gains),
            }
        common.print_row(**summary)


def support(args, kind, folder, rest, labels):
    """(text, label ids) of what a kind of support adds to the training set in the folder."""
    if kind == "random":
        return rest[: args.num]
    if kind in AUGMENTED:
        path = folder / f"{kind}.txt"
        flags = {"aug_strategy": kind.removeprefix("aug_"), "dict_dir": args.dict_dir}
        aug.main(common.argv(train_path=folder / "train.txt", aug_path=path, **flags))
        return list(zip(*utils.read_examples(path, labels)))
    path = folder / f"support_{kind}.txt"
    flags = {"dataset_dir": folder, "params_path": folder / "base", "device": args.device}
    flags |= {"sparse_num": args.num, "support_num": args.num, "support_file": path.name}
    if kind != "annotate":
        sparse.main(common.argv(aug_strategy=kind, dict_dir=args.dict_dir, **flags))
        return list(zip(*utils.read_examples(path, labels)))
    with utils.atomic_file(folder / "data.txt") as file:
        file.writelines(f"{text}\n" for text, _ in rest)
    sparse.main(common.argv(annotate=True, **flags))
    gold = dict(rest)
    return [(text, gold[text]) for text in utils.read_texts(path)]


def classify(args, folder, train_file, save_dir):
    """F1s on dev, in percent, of both classifiers trained on a file of the folder."""
    svm = common.f1_percent(baseline.evaluate(folder, train_file))
    svm = {f"svm_{name}": value for name, value in svm.items()}
    if args.svm_only:
        return svm
    flags = {"train_file": train_file, "device": args.device}
    return {**common.train(folder, save_dir, *args.train_args, **flags), **svm}


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else None


if __name__ == "__main__":
    utils.cli(main)
