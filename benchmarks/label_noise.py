"""How many wrong labels does analysis/dirty.py find, and what is cleaning worth?

    python benchmarks/label_noise.py --dataset_dir data --strategies tfidf

A share of the training samples gets wrong labels: the label set of another sample (set), one label
less (drop) or one more, more often a frequent one (add). Each strategy then names as many suspects
as there are such samples: precision and recall are equal, and random picking finds the share. A
classifier is trained on the clean data, on the noisy data and on the noisy data without the
suspects. Samples that were wrong from the start count as false alarms.
"""

import json
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
import baseline  # noqa: E402
import dirty  # noqa: E402

import utils  # noqa: E402
from utils import UserError  # noqa: E402


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
    add("--train_args", default="", help="flags for train.py")
    return parser.parse_args(argv)


def inject_noise(label_ids, share, kind, seed):
    """Returns (label ids with wrong ones, indexes of the samples that have them)."""
    if len({frozenset(ids) for ids in label_ids}) < 2:
        raise UserError("all samples have the same labels; there are no others to give them")
    rng = np.random.default_rng(seed)
    number = round(share * len(label_ids))
    everything = set().union(*label_ids)
    room = {"set": lambda ids: True, "drop": bool, "add": lambda ids: set(ids) < everything}
    suited = np.flatnonzero([room[kind](ids) for ids in label_ids])
    chosen = np.sort(rng.choice(suited, min(number, len(suited)), replace=False))
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


def write(path, texts, label_ids, labels):
    with utils.atomic_file(path) as file:
        names = [[labels[i] for i in ids] for ids in label_ids]
        utils.write_rows(file, texts, names, labels, jsonl=False)


def finetune(args, dataset_dir, train_file, save_dir):
    """F1s on dev, in percent, of train.py's best epoch; a finished run in save_dir is reused."""
    import train

    flags = ["--dataset_dir", dataset_dir, "--train_file", train_file, "--save_dir", save_dir]
    flags += ["--device", args.device, "--resume", *shlex.split(args.train_args)]
    train.main([str(flag) for flag in flags])
    lines = (save_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [json.loads(line) for line in lines if '"event": "eval"' in line]
    best = max(evals, key=lambda event: event["macro_f1"])
    return [100 * best[name] for name in ("micro_f1", "macro_f1")]


def svm(dataset_dir, train_file, labels):
    """The same of TF-IDF with a linear SVM."""
    train, dev = (
        utils.read_examples(Path(dataset_dir) / file, labels) for file in (train_file, "dev.txt")
    )
    counts = baseline.evaluate(train, dev, len(labels))
    return [100 * counts.micro_f1, 100 * counts.macro_f1]


def f1s(args, dataset_dir, train_file, save_dir, labels):
    if args.retrain == "finetune":
        return finetune(args, dataset_dir, train_file, save_dir)
    return svm(dataset_dir, train_file, labels)


def run_strategy(args, strategy, folder, dirty_num):
    """Runs dirty.py as a user does; it writes dirty_<strategy>.txt and rest_<strategy>.txt."""
    flags = ["--dataset_dir", folder, "--strategy", strategy, "--dirty_num", dirty_num]
    flags += ["--dirty_file", f"dirty_{strategy}.txt", "--rest_file", f"rest_{strategy}.txt"]
    flags += ["--folds", args.folds, "--device", args.device]
    if strategy == "trustai":
        finetune(args, folder, "train.txt", folder / "checkpoint")
        flags += ["--params_path", folder / "checkpoint"]
    if strategy == "finetune":
        flags += ["--folds_dir", folder / "folds", f"--train_args={args.train_args}"]
    dirty.main([str(flag) for flag in flags])


def main(argv=None):
    args = parse_args(argv)
    data, work = Path(args.dataset_dir), Path(args.work_dir).resolve()
    labels = utils.read_labels(data / "label.txt")
    texts, label_ids = utils.read_examples(data / "train.txt", labels)
    work.mkdir(parents=True, exist_ok=True)
    clean = f1s(args, data, "train.txt", work / "clean", labels)
    print(json.dumps({"train": "clean", "micro_f1": clean[0], "macro_f1": clean[1]}), flush=True)
    found, gained = ({strategy: [] for strategy in args.strategies} for _ in range(2))
    lost = []
    for seed in args.seeds:
        folder = work / str(seed)
        folder.mkdir(exist_ok=True)
        for name in ("dev.txt", "label.txt"):
            shutil.copyfile(data / name, folder / name)
        noisy_ids, chosen = inject_noise(label_ids, args.noise, args.kind, seed)
        write(folder / "train.txt", texts, noisy_ids, labels)
        noisy = f1s(args, folder, "train.txt", folder / "checkpoint", labels)
        result = {"train": "noisy", "seed": seed, "micro_f1": noisy[0], "macro_f1": noisy[1]}
        print(json.dumps(result), flush=True)
        lost.append(clean[1] - noisy[1])
        wrong = {(texts[i], *noisy_ids[i]) for i in chosen}
        for strategy in args.strategies:
            run_strategy(args, strategy, folder, len(chosen))
            suspects = zip(*utils.read_examples(folder / f"dirty_{strategy}.txt", labels))
            hits = sum((text, *ids) in wrong for text, ids in suspects)
            rest = f"rest_{strategy}.txt"
            after = f1s(args, folder, rest, folder / f"cleaned_{strategy}", labels)
            found[strategy].append(hits / len(chosen))
            gained[strategy].append(after[1] - noisy[1])
            result = {
                "train": f"noisy without {strategy}'s suspects",
                "seed": seed,
                "precision_and_recall": round(found[strategy][-1], 4),
                "times_random": round(found[strategy][-1] / args.noise, 2),
                "micro_f1": after[0],
                "macro_f1": after[1],
            }
            print(json.dumps(result, ensure_ascii=False), flush=True)
    summary = {
        strategy: {
            "precision_and_recall": round(statistics.mean(found[strategy]), 4),
            # Of the means: a single run may lose next to nothing.
            "lost_macro_f1_recovered": round(sum(gained[strategy]) / sum(lost), 3),
        }
        for strategy in args.strategies
    }
    print(json.dumps({"mean": summary, "seeds": args.seeds}))


if __name__ == "__main__":
    utils.cli(main)
