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

import json
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
import aug  # noqa: E402
import sparse  # noqa: E402
from label_noise import finetune, svm, write  # noqa: E402

import utils  # noqa: E402
from utils import UserError  # noqa: E402

AUGMENTED = tuple(f"aug_{strategy}" for strategy in ("mix", *aug.STRATEGIES))
KINDS = ("duplicate", *aug.STRATEGIES, "annotate", "random", *AUGMENTED)


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    add(
        "--work_dir", default="sparse_support", help="for data and models; finished ones are reused"
    )
    add("--num_train", type=utils.at_least(1), default=500, help="size of the part")
    add("--num", type=utils.at_least(1), default=100, help="--sparse_num and --support_num")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of the part")
    add("--kinds", nargs="+", choices=KINDS, default=["duplicate", "substitute"], help="to compare")
    add("--svm_only", action="store_true", help="do not run train.py")
    add("--dict_dir", help="word lists of aug.py")
    add("--device", default="cpu", help="of train.py and sparse.py")
    add("--train_args", default="", help="flags for train.py")
    return parser.parse_args(argv)


def add_support(args, kind, folder, rest, labels):
    """Writes train_<kind>.txt: the part of the training set with the support data after it."""
    texts, label_ids = utils.read_examples(folder / "train.txt", labels)
    if kind == "random":
        more = rest[0][: args.num], rest[1][: args.num]
    elif kind in AUGMENTED:
        flags = ["--train_path", folder / "train.txt", "--aug_path", folder / f"{kind}.txt"]
        flags += ["--aug_strategy", kind.removeprefix("aug_")]
        flags += ["--dict_dir", args.dict_dir] if args.dict_dir else []
        aug.main([str(flag) for flag in flags])
        more = utils.read_examples(folder / f"{kind}.txt", labels)
    else:
        flags = ["--dataset_dir", folder, "--params_path", folder / "base", "--device", args.device]
        flags += ["--sparse_num", args.num, "--support_num", args.num]
        flags += ["--support_file", f"support_{kind}.txt"]
        if kind == "annotate":
            with utils.atomic_file(folder / "data.txt") as file:
                file.writelines(text + "\n" for text in rest[0])
            flags += ["--annotate"]
        else:
            flags += ["--aug_strategy", kind]
            flags += ["--dict_dir", args.dict_dir] if args.dict_dir else []
        sparse.main([str(flag) for flag in flags])
        if kind == "annotate":
            gold = dict(zip(*rest))
            chosen = list(utils.read_texts(folder / f"support_{kind}.txt"))
            more = chosen, [gold[text] for text in chosen]
        else:
            more = utils.read_examples(folder / f"support_{kind}.txt", labels)
    write(folder / f"train_{kind}.txt", [*texts, *more[0]], [*label_ids, *more[1]], labels)


def main(argv=None):
    args = parse_args(argv)
    if args.svm_only and not set(args.kinds) <= {"random", *AUGMENTED}:
        raise UserError("--svm_only: only 'random' and 'aug_*' can do without a trained model")
    figures = ("svm_micro_f1", "svm_macro_f1")
    if not args.svm_only:
        figures = ("micro_f1", "macro_f1", *figures)
    data, work = Path(args.dataset_dir), Path(args.work_dir).resolve()
    labels = utils.read_labels(data / "label.txt")
    texts, label_ids = utils.read_examples(data / "train.txt", labels)
    dev = utils.read_examples(data / "dev.txt", labels)
    results = {kind: [] for kind in ("base", *args.kinds)}
    for seed in args.seeds:
        folder = work / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(seed).permutation(len(texts))
        part, rest = order[: args.num_train], order[args.num_train :]
        known = {*dev[0], *(texts[i] for i in part)}
        rest = [i for i in rest if texts[i] not in known]  # sparse.py takes none of these, too
        write(folder / "train.txt", [texts[i] for i in part], [label_ids[i] for i in part], labels)
        write(folder / "dev.txt", *dev, labels)
        with utils.atomic_file(folder / "label.txt") as file:
            file.writelines(label + "\n" for label in labels)
        for kind in results:
            train_file = "train.txt" if kind == "base" else f"train_{kind}.txt"
            if kind != "base":
                examples = [texts[i] for i in rest], [label_ids[i] for i in rest]
                add_support(args, kind, folder, examples, labels)
            row = [] if args.svm_only else finetune(args, folder, train_file, folder / kind)
            row += svm(folder, train_file, labels)
            results[kind].append(row)
            rounded = {name: round(value, 2) for name, value in zip(figures, row)}
            print(json.dumps({"seed": seed, "train": kind, **rounded}), flush=True)
    for kind, rows in results.items():
        summary = {"train": kind, "seeds": args.seeds}
        for name, values, base in zip(figures, zip(*rows), zip(*results["base"])):
            gains = [value - other for value, other in zip(values, base)]
            summary[name] = {
                "mean": round(statistics.mean(values), 2),
                "std": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "gain": round(statistics.mean(gains), 2),
                "gain_std": round(statistics.stdev(gains), 2) if len(gains) > 1 else None,
            }
        print(json.dumps(summary))


if __name__ == "__main__":
    utils.cli(main)
