"""Turns an annotation export of doccano or Label Studio into train, dev, test and label files.

    python data/doccano.py --doccano_file doccano.jsonl --save_dir my_data --splits 0.8 0.2

It reads doccano's JSONL, JSON and zip archives and Label Studio's JSON and JSON-MIN; several files
are read as one. With 1, 2 or 3 splits it writes train.txt, dev.txt and test.txt, the texts of the
last of them as data.txt, and label.txt. Where several annotators labelled a text, a label stays if
more than half of them gave it.
"""

import os
import re
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from fractions import Fraction
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import exports

import utils
from utils import UserError, at_least, logger

APPROVED_ONLY = '"Export only approved documents"'
DRAWS = 5  # stratified splits of which the best is taken,
GOOD_GAP = 0.0005  # or the first whose shares of labels differ by less


def boolean(value):
    """An argparse type; bool("False") is True."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if value.lower() not in known:
        raise ArgumentTypeError(f"{value} is neither True nor False")
    return known[value.lower()]


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    exported = "exports of doccano or Label Studio: one or several files, or doccano's zip"
    add("--doccano_file", default=["doccano.jsonl"], nargs="+", help=exported)
    add("--task_type", choices=["multi_label"], default="multi_label", help="the only one so far")
    add("--text_field", help="field of the text; None: data, text or the only one it can be")
    fields = "fields of the labels, which are joined; None: label(s) or the only one with choices"
    add("--label_field", nargs="+", help=fields)
    path = "joins the path of a taxonomy to a label; None: the last element is the label"
    add("--separator", help=path)
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--save_dir", default="./data", help="folder of the files; made if it is missing")
    add("--splits", type=at_least(0.0), nargs="+", default=[0.8, 0.2], help="shares, together 1")
    add("--is_shuffle", type=boolean, default=True, help="shuffle and stratify, or cut in order")
    add("--seed", type=at_least(0), default=3, help="seed of order and splits")
    labels = "keep these class ids, other labels are an error; None: with --valid and --dirty "
    labels += "label.txt in --save_dir"
    add("--label_file", help=labels)
    add("--skip_unlabeled", action="store_true", help="leave out samples without labels")
    add("--overwrite", action="store_true", help="replace files that exist")
    add = group.add_mutually_exclusive_group().add_argument
    add("--valid", action="store_true", help="write valid.txt only; needs --splits 1")
    add("--dirty", action="store_true", help="write train_dirty.txt only; needs --splits 1")
    args = parser.parse_args(argv)
    if len(args.splits) > 3:
        raise UserError("--splits: give 1, 2 or 3 shares")
    args.splits = [Fraction(str(share)) for share in args.splits]  # 0.7, 0.2 and 0.1 make 1
    if sum(args.splits) != 1 or not all(args.splits):
        raise UserError("--splits: every share must be above 0 and their sum 1")
    if (args.valid or args.dirty) and len(args.splits) > 1:
        raise UserError("--valid and --dirty write one file; add --splits 1")
    return args


def main(argv=None):
    args, start = parse_args(argv), time.time()
    folder = Path(args.save_dir)
    if args.valid or args.dirty:
        names = targets = ["valid.txt" if args.valid else "train_dirty.txt"]
    else:
        names = ["train.txt", "dev.txt", "test.txt"][: len(args.splits)]
        targets = [*names, "data.txt", "label.txt"]
    label_path, given = folder / "label.txt", args.label_file
    if not given and "label.txt" not in targets:  # samples for a data set that has its labels
        given = str(label_path) if label_path.is_file() else None
    if args.dirty and not given:
        hint = "give the training set's label file with --label_file"
        raise UserError(f"{label_path}: not found, and --dirty takes no new labels; {hint}")
    known = utils.read_labels(given) if given else None
    if known and "label.txt" in targets and label_path.is_file():
        if utils.read_labels(label_path) == known:  # nothing would change
            targets.remove("label.txt")
    existing = [str(folder / name) for name in targets if os.path.lexists(folder / name)]
    if existing and not args.overwrite:
        raise UserError(f"{', '.join(existing)}: exists; add --overwrite to replace it")
    utils.check_outputs(existing, [*args.doccano_file, *filter(None, [given])])

    samples = read_samples(args, known, "--label_file" if args.label_file else given)
    labels = known or sorted({name for _, names in samples for name in names})
    parts, gap = split(samples, labels, args)
    contents = {"data.txt": [text for text, _ in parts[-1]], "label.txt": labels}
    for name, part in zip(names, parts):
        contents[name] = [f"{text}\t{','.join(given)}" for text, given in part]
    utils.write_files(folder, {n: "".join(f"{x}\n" for x in contents[n]) for n in targets})
    for name in targets:
        what = "labels" if name == "label.txt" else "examples"
        logger.info(f"Save %d {what} to %s.", len(contents[name]), folder / name)
    if len(parts) > 1:
        message = "Label shares of splits and whole differ by at most %.2f percentage points."
        logger.info(message, 100 * gap)
    if "test.txt" not in targets and "data.txt" in targets and (folder / "test.txt").exists():
        logger.warning("%s is of an earlier run; remove it", folder / "test.txt")
    logger.info("Finished! It takes %.2f seconds", time.time() - start)


# ----------------------------------------------------------------------------------- the samples
def clean_text(text, dirty):
    """The text on one line; raises ValueError for what no data file can hold."""
    text = text.lstrip("\ufeff").strip()
    if dirty and "\t" in text:  # exports may lack the tab of a sample that had no label
        text = text.rpartition("\t")[0].rstrip()
    text = re.sub(r"[\t\r\n]+", " ", text)
    if not text:
        raise ValueError("empty text; delete the record")
    if len(text.encode()) > utils.MAX_LINE // 2:
        raise ValueError(f"text longer than {utils.MAX_LINE // 2} bytes; split it")
    return text


class Cleaner:
    """Makes label names of what annotators gave; each different one is checked once."""

    def __init__(self, known, known_in, separator):
        self.known, self.known_in, self.separator = known, known_in, separator
        self.names, self.paths = {}, {}

    def __call__(self, given):
        """The names without repetition; raises ValueError for any that is none or not known."""
        names = []
        for name in given:
            if not isinstance(name, str | tuple):
                hint = "export text classification, not spans"
                raise ValueError(f"label {exports.shortened(name)} is no name; {hint}")
            if name not in self.names:
                self.names[name] = self.clean(name)
            names.append(self.names[name])
        return list(dict.fromkeys(names))

    def clean(self, given):
        name = given
        if isinstance(given, tuple):  # a path in a taxonomy
            name = self.separator.join(given) if self.separator else given[-1]
        name = name.strip()
        name.encode()
        if not name:
            raise ValueError("empty label name; rename it")
        if re.search(r"[,\t\r\n]", name):
            raise ValueError(f"label {name!r} has a comma, tab or line break; rename it")
        if self.known is not None and name not in self.known:
            raise ValueError(f"label '{name}' is not in {self.known_in}; add it there at the end")
        if isinstance(given, tuple):
            self.paths.setdefault(name, set()).add(given)
        return name


class Task:
    """A text and what the annotators gave it, from all records of the same id and text."""

    __slots__ = ("votes", "truths", "is_listed")

    def __init__(self, is_listed):
        self.votes, self.truths, self.is_listed = [], [], is_listed

    def given(self):
        return self.truths or self.votes


def majority(votes):
    if len(votes) == 1:
        return votes[0]
    counts = Counter(name for vote in votes for name in vote)
    return [name for name, count in counts.items() if 2 * count > len(votes)]


def read_samples(args, known, known_in):
    """[(text, label names)] in the order of the export; raises UserError that lists the faults."""
    source, *others = args.doccano_file
    source += f" and {len(others)} more" if others else ""
    records = exports.read(args.doccano_file)
    controls, fields = exports.find_label_fields(records, source, args.label_field, args.text_field)
    text_fields = exports.find_text_fields(records, args.text_field, [*controls, *fields])
    clean = Cleaner(known, known_in, args.separator)
    problems, tasks, unanswered, changed, tabs = [], {}, set(), 0, 0
    for record in records:
        try:
            answers = [
                exports.labels_of(record, answer, controls, fields, joined=bool(args.label_field))
                for answer in record.answers
            ]
            answers = [clean(answer) for answer in answers if answer is not None]
            if not answers:
                unanswered.add(record.task)
                continue
            raw = exports.text_of(record, text_fields, [*controls, *fields]).strip()
            if not raw and not any(answers):
                unanswered.add(record.task)
                continue
            text = clean_text(raw, args.dirty)
        except UnicodeEncodeError:
            problems.append(f"{record.where}: invalid Unicode (lone surrogate); correct the record")
        except ValueError as error:
            problems.append(f"{record.where}: {error}")
        else:
            # Label Studio's JSON-MIN has a record for each annotator of a task.
            task = tasks.setdefault((record.task, text), Task(record.kind == "plain"))
            (task.truths if record.is_truth else task.votes).extend(answers)
            tabs += "\t" in raw
            changed += re.search(r"[\t\r\n]", raw) is not None
    utils.check_problems(problems)
    if args.dirty and not tabs:
        raise UserError(f"{source}: no text has a tab and an old label after it; leave out --dirty")
    check_empty_lists(tasks.values(), source)
    samples, undecided, untouched = [], 0, 0
    for (_, text), task in tasks.items():
        names, given = majority(task.given()), any(task.given())
        if names or not given:
            samples.append((text, names))
        else:  # the annotators agree on nothing, but nobody has said that there is no label
            undecided += 1
        untouched += task.is_listed and not given
    if undecided:
        message = "Left out %d texts: no label was given by a majority of their annotators."
        logger.warning(message, undecided)
    if not any(names for _, names in samples):
        raise UserError(f"{source}: no text has a label; annotate and export again")
    if missing := len(unanswered - {number for number, _ in tasks}):
        logger.info("Left out %d tasks without annotation.", missing)
    several = [set(map(frozenset, t.given())) for t in tasks.values() if len(t.given()) > 1]
    if several:
        message = "%d texts have several annotators, %d of them conflict: the majority decides."
        logger.info(message, len(several), sum(len(answers) > 1 for answers in several))
    if changed and not args.dirty:
        logger.warning("Tabs or line breaks in %d texts became spaces.", changed)
    for name, paths in clean.paths.items():
        if len(paths) > 1 and not args.separator:
            ends = ", ".join("/".join(path) for path in sorted(paths))
            message = "Label %s is the end of %d paths (%s); --separator / keeps them apart."
            logger.warning(message, name, len(paths), ends)
    if args.skip_unlabeled:
        unlabelled = sum(not names for _, names in samples)
        logger.info("%d samples have no label: left out.", unlabelled)
        return [sample for sample in samples if sample[1]]
    if untouched:
        message = "%d texts have an empty list of labels and count as samples without labels. %s"
        hint = f"If nobody has looked at them, tick {APPROVED_ONLY} in doccano's export."
        logger.warning(message, untouched, hint)
    if unlabelled := sum(not names for _, names in samples):
        logger.info("%d samples have no label: written as text<TAB>.", unlabelled)
    return samples


def check_empty_lists(tasks, source):
    """Raises UserError if empty lists in doccano's exports are hardly the members' answers.

    By default, doccano 1.8 writes every text into every member's file. The list is then empty where
    the member has never looked; if only approved texts are exported, it says that no label fits.
    """
    several = [t for t in tasks if t.is_listed and len(t.votes) > 1 and any(t.votes)]
    split = sum(not all(task.votes) for task in several)
    if split > 1 and 2 * split > len(several):
        message = f"{split} of {len(several)} texts have labels from one member and an empty list"
        hint = f"tick {APPROVED_ONLY} and export again, or delete the records that are no answer"
        raise UserError(f"{source}: {message} from another, who may not have seen them; {hint}")


# ------------------------------------------------------------------------------------- the split
def stratify(groups, label_ids, num_labels, sizes, rng):
    """The index of the split for each group of samples that must stay together.

    Iterative stratification: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label
    Data", ECML PKDD 2011, algorithm 1. It serves the rarest label first and gives a sample to the
    split that lacks most of that label. Two things are added: having no label counts as a label,
    and no split exceeds its size by more than 2%: rare labels all prefer the largest split, and
    many of them would leave the others empty.
    """
    labels = [[x for i in group for x in label_ids[i] or [num_labels]] for group in groups]
    members, left = [[] for _ in range(num_labels + 1)], [0] * (num_labels + 1)
    # Large groups first: single samples can even out what these leave.
    for g in sorted(rng.permutation(len(groups)).tolist(), key=lambda g: -len(groups[g])):
        for label in labels[g]:
            members[label].append(g)
            left[label] += 1
    # For each label what every split lacks of it; lists, as elements of arrays are slow to change.
    need = np.outer(left, np.array(sizes) / sum(sizes)).tolist()
    room, slack = list(sizes), [size // 50 for size in sizes]
    free, chosen = [j for j, size in enumerate(sizes) if size], [None] * len(groups)
    while any(left):
        rarest = min((x for x, number in enumerate(left) if number), key=left.__getitem__)
        lack = need[rarest]
        for g in members[rarest]:
            if chosen[g] is None:
                best = chosen[g] = max(free, key=lambda j: (lack[j], room[j]))
                room[best] -= len(groups[g])
                if room[best] + slack[best] <= 0:
                    free.remove(best)
                for label in labels[g]:
                    need[label][best] -= 1
                    left[label] -= 1
    return chosen


def share_gap(label_ids, num_labels, split_of):
    """The largest difference between a label's share of a split and its share of all samples."""
    lengths = np.fromiter(map(len, label_ids), int)
    given = np.fromiter(chain.from_iterable(label_ids), int)
    counts = np.zeros((max(split_of) + 1, num_labels))
    np.add.at(counts, (np.repeat(split_of, lengths), given), 1)
    shares = counts / np.maximum(np.bincount(split_of), 1)[:, None]
    return float(abs(shares - counts.sum(0) / len(label_ids)).max())


def split(samples, labels, args):
    """(A list of samples for each split, share_gap); samples of the same text stay together."""
    rng, ids = np.random.default_rng(args.seed), {name: i for i, name in enumerate(labels)}
    label_ids = [[ids[name] for name in names] for _, names in samples]
    by_text = {}
    for i, (text, _) in enumerate(samples):
        by_text.setdefault(text, []).append(i)
    groups = list(by_text.values())
    if repeated := [group for group in groups if len(group) > 1]:
        conflicting = sum(len({frozenset(label_ids[i]) for i in group}) > 1 for group in repeated)
        message = "%d duplicate texts, %d with conflicting labels; each is in one split only"
        logger.warning(message, len(repeated), conflicting)
    ends = [int(len(samples) * share) for share in accumulate(args.splits)]
    sizes = np.diff([0, *ends]).tolist()
    order = rng.permutation(len(samples)).tolist() if args.is_shuffle else range(len(samples))
    best, gap = None, np.inf
    for _ in range(DRAWS if args.is_shuffle and len(sizes) > 1 else 1):
        if args.is_shuffle:
            chosen = stratify(groups, label_ids, len(labels), sizes, rng)
        else:
            chosen = [sum(group[0] >= end for end in ends) for group in groups]
        split_of = np.empty(len(samples), int)
        for group, j in zip(groups, chosen):
            split_of[group] = j
        if (found := share_gap(label_ids, len(labels), split_of)) < gap:
            best, gap = split_of.tolist(), found
        if gap < GOOD_GAP:
            break
    parts = [[samples[i] for i in order if best[i] == j] for j in range(len(sizes))]
    if not all(parts):
        raise UserError(f"--splits: {len(samples)} samples are too few for {len(sizes)} splits")
    return parts, gap


if __name__ == "__main__":
    utils.cli(main)
