"""Turns an annotation export of doccano or Label Studio into train, dev, test and label files.

    python data/doccano.py --doccano_file doccano.jsonl --save_dir my_data --splits 0.8 0.2

It reads doccano's JSON Lines (text in `data` or `text`, labels in `label` or `labels`) and Label
Studio's JSON and JSON-MIN; the content decides which. With 1, 2 or 3 splits it writes train.txt,
dev.txt and test.txt, the texts of the last of them as data.txt, and label.txt. Where several
annotators labelled a text, a label stays if more than half of them gave it.
"""

import json
import os
import re
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError, at_least, logger

TEXT_FIELDS = ("data", "text")
LABEL_FIELDS = ("label", "labels", "choice", "choices")
DRAWS = 5  # stratified splits of which the best is taken


def boolean(value):
    """An argparse type; bool("False") is True."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if value.lower() not in known:
        raise ArgumentTypeError(f"{value} is neither True nor False")
    return known[value.lower()]


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--doccano_file", default="doccano.jsonl", help="export of doccano or Label Studio")
    add("--task_type", choices=["multi_label"], default="multi_label", help="the only one so far")
    add("--text_field", help="field of the text; None: data, text or the only one it can be")
    add("--label_field", help="field of the labels; None: label(s), choice(s) or what has choices")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--save_dir", default="./data", help="folder of the files; made if it is missing")
    add("--splits", type=at_least(0.0), nargs="+", default=[0.8, 0.2], help="shares, together 1")
    add("--is_shuffle", type=boolean, default=True, help="shuffle and stratify, or cut in order")
    add("--seed", type=at_least(0), default=3, help="seed of order and splits")
    add("--label_file", help="keep the class ids of this file; a label that it lacks is an error")
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
    known = utils.read_labels(args.label_file) if args.label_file else None
    label_path = folder / "label.txt"
    if known and "label.txt" in targets and label_path.is_file():
        if utils.read_labels(label_path) == known:  # nothing would change
            targets.remove("label.txt")
    existing = [str(folder / name) for name in targets if os.path.lexists(folder / name)]
    if existing and not args.overwrite:
        raise UserError(f"{', '.join(existing)}: exists; add --overwrite to replace it")
    utils.check_outputs(existing, filter(None, [args.doccano_file, args.label_file]))

    samples = read_samples(args, known)
    labels = known or sorted({name for _, names in samples for name in names})
    parts = split(samples, labels, args)
    contents = {"data.txt": [text for text, _ in parts[-1]], "label.txt": labels}
    for name, part in zip(names, parts):
        contents[name] = [f"{text}\t{','.join(given)}" for text, given in part]
    utils.write_files(folder, {n: "".join(f"{x}\n" for x in contents[n]) for n in targets})
    for name in targets:
        what = "labels" if name == "label.txt" else "examples"
        logger.info(f"Save %d {what} to %s.", len(contents[name]), folder / name)
    if len(parts) > 1:
        message = "Label shares of splits and whole differ by at most %.2f percentage points."
        logger.info(message, 100 * share_gap(samples, parts))
    if "test.txt" not in targets and "data.txt" in targets and (folder / "test.txt").exists():
        logger.warning("%s is of an earlier run; remove it", folder / "test.txt")
    logger.info("Finished! It takes %.2f seconds", time.time() - start)


# ------------------------------------------------------------------------------------ the export
def read_records(path):
    """[(where, JSON value)] of a file of JSON lines or of one JSON array."""
    with utils.open_binary(path) as file:
        content = file.read()
    if content.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: a zip archive; unpack it and give the file inside")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        n, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        message = f"{path}:{n}: not valid UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
        raise UserError(message) from error
    if text.lstrip().startswith("["):
        return read_array(path, text)
    records, problems = [], []
    for n, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028, too
        try:
            if line.strip():
                records.append((f"{path}:{n}", json.loads(line)))
        except (ValueError, RecursionError):
            hint = "export JSONL from doccano or JSON from Label Studio"
            problems.append(f"{path}:{n}: not JSON; {hint}")
    utils.check_problems(problems)
    return records


def read_array(path, text):
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        n, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UserError(f"{path}:{n}: not JSON ({reason}); export again") from error
    ids = [record.get("id") if isinstance(record, dict) else None for record in records]
    where = [f"record {n}" if i is None else f"task {i}" for n, i in enumerate(ids, 1)]
    return [(f"{path}: {name}", record) for name, record in zip(where, records)]


def as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def has_choices(value):
    return isinstance(value, dict) and isinstance(value.get("choices"), list)


def split_record(record):
    """(fields that may hold the text, one {field: labels} per annotator) of any kind of export."""
    if not isinstance(record.get("data"), dict):
        return record, [record]
    given = [a for a in as_list(record.get("annotations")) if isinstance(a, dict)]
    given = [annotation for annotation in given if not annotation.get("was_cancelled")]
    answers = []
    # An annotation that a reviewer marked as the truth is not outvoted.
    for annotation in [a for a in given if a.get("ground_truth")] or given:
        answers.append({})
        for result in as_list(annotation.get("result")):
            if isinstance(result, dict) and "from_name" in result:  # not so for relations
                answers[-1].setdefault(str(result["from_name"]), []).append(result.get("value"))
    return record["data"], answers


def find_label_fields(path, answers, given):
    """Names of the fields that may hold the labels; the first that a record has counts."""
    names = dict.fromkeys(name for answer in answers for name in answer)
    choices = [n for n in names if any(any(map(has_choices, as_list(a.get(n)))) for a in answers)]
    found = [given] if given else choices or list(LABEL_FIELDS)
    if len(choices) > 1 and not given:
        raise UserError(f"{path}: choices in {', '.join(choices)}; name one with --label_field")
    if not any(name in names for name in found):
        fields = f"only {', '.join(names)}" if names else "no annotation at all"
        hint = "export the annotations or name the field with --label_field"
        raise UserError(f"{path}: no labels in field {' or '.join(found)}, {fields}; {hint}")
    return found


def find_text(fields, given, label_fields):
    strings = [k for k, v in fields.items() if isinstance(v, str) and k not in label_fields]
    named = [name for name in ([given] if given else TEXT_FIELDS) if name in strings]
    if not named and (given or len(strings) != 1):
        wanted = given or " or ".join(TEXT_FIELDS)
        raise ValueError(f"no text in field {wanted}; name the right one with --text_field")
    return fields[(named or strings)[0]]


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


def clean_labels(value, known):
    """One annotator's label names; raises ValueError for any that is none or not in `known`."""
    names = sum((i["choices"] if has_choices(i) else [i] for i in as_list(value)), [])
    for i, name in enumerate(names):
        if not isinstance(name, str):
            what = json.dumps(name, ensure_ascii=False)[:40]
            raise ValueError(f"label {what} is no name; export text classification, not spans")
        names[i] = name = name.strip()
        name.encode()
        if not name:
            raise ValueError("empty label name; rename it")
        if re.search(r"[,\t\r\n]", name):
            raise ValueError(f"label {name!r} has a comma, tab or line break; rename it")
        if known is not None and name not in known:
            raise ValueError(f"label '{name}' is not in --label_file; add it there at the end")
    return list(dict.fromkeys(names))


def majority(votes):
    counts = Counter(name for vote in votes for name in vote)
    return [name for name, count in counts.items() if 2 * count > len(votes)]


def read_samples(args, known):
    """[(text, label names)] in the order of the export; raises UserError that lists the faults."""
    path, problems, votes, changed, tabs = args.doccano_file, [], {}, 0, 0
    records = read_records(path)
    parts = [split_record(r) if isinstance(r, dict) else ({}, []) for _, r in records]
    label_fields = find_label_fields(path, [a for part in parts for a in part[1]], args.label_field)
    for (where, record), (fields, answers) in zip(records, parts):
        try:
            raw = find_text(fields, args.text_field, label_fields)
            text = clean_text(raw, args.dirty)
            # Label Studio's JSON-MIN has a record for each annotator of a task.
            given = votes.setdefault((repr(record.get("id", where)), text), [])
            for answer in answers:
                value = next((answer[name] for name in label_fields if name in answer), None)
                given.append(clean_labels(value, known))
        except UnicodeEncodeError:
            problems.append(f"{where}: invalid Unicode (lone surrogate); correct the record")
        except ValueError as error:
            problems.append(f"{where}: {error}")
        else:
            tabs += "\t" in raw.strip()
            changed += re.search(r"[\t\r\n]", raw.strip()) is not None
    utils.check_problems(problems)
    if args.dirty and not tabs:
        raise UserError(f"{path}: no text has a tab and an old label after it; leave out --dirty")
    settled = [(text, majority(given), given) for (_, text), given in votes.items() if given]
    # Where the annotators agree on nothing, nobody has said that there is no label.
    samples = [(text, names) for text, names, given in settled if names or not any(given)]
    if undecided := len(settled) - len(samples):
        message = "Left out %d texts: no label was given by a majority of their annotators."
        logger.warning(message, undecided)
    if not any(names for _, names in samples):
        raise UserError(f"{path}: no text has a label; annotate and export again")
    if len(settled) < len(votes):
        logger.info("Left out %d tasks without annotation.", len(votes) - len(settled))
    if several := [set(map(frozenset, given)) for given in votes.values() if len(given) > 1]:
        message = "%d texts have several annotators, %d of them conflict: the majority decides."
        logger.info(message, len(several), sum(len(answers) > 1 for answers in several))
    if changed and not args.dirty:
        logger.warning("Tabs or line breaks in %d texts became spaces.", changed)
    if unlabelled := sum(not names for _, names in samples):
        what = "left out" if args.skip_unlabeled else "written as text<TAB>"
        logger.info("%d samples have no label: %s.", unlabelled, what)
    return [sample for sample in samples if sample[1] or not args.skip_unlabeled]


# ------------------------------------------------------------------------------------- the split
def stratify(groups, label_ids, num_labels, sizes, rng):
    """The index of the split for each group of samples that must stay together.

    Iterative stratification: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label
    Data", ECML PKDD 2011, algorithm 1. It serves the rarest label first and gives a sample to the
    split that lacks most of that label. Two things are added: having no label counts as a label,
    and no split exceeds its size by more than 2%: rare labels all prefer the largest split, and
    many of them would leave the others empty.
    """
    counts = [Counter(x for i in group for x in label_ids[i] or [num_labels]) for group in groups]
    members, left = [[] for _ in range(num_labels + 1)], np.zeros(num_labels + 1)
    # Large groups first: single samples can even out what these leave.
    for g in sorted(rng.permutation(len(groups)), key=lambda g: -len(groups[g])):
        for label, count in counts[g].items():
            members[label].append(g)
            left[label] += count
    need = np.outer(np.array(sizes) / sum(sizes), left)  # [splits, labels]
    room, chosen = list(sizes), [None] * len(groups)
    while left.any():
        rarest = int(np.argmin(np.where(left > 0, left, np.inf)))
        for g in members[rarest]:
            if chosen[g] is None:
                free = [j for j in range(len(sizes)) if room[j] + sizes[j] // 50 > 0]
                best = max(free, key=lambda j: (need[j, rarest], room[j], rng.random()))
                chosen[g] = best
                room[best] -= len(groups[g])
                for label, count in counts[g].items():
                    need[best, label] -= count
                    left[label] -= count
    return chosen


def share_gap(samples, parts):
    """The largest difference between a label's share of a part and its share of all samples."""

    def shares(part):
        counts = Counter(name for _, given in part for name in given)
        return np.array([counts[name] for name in names]) / max(len(part), 1)

    names = {name for _, given in samples for name in given}
    whole = shares(samples)
    return max(float(abs(shares(part) - whole).max()) for part in parts)


def split(samples, labels, args):
    """A list of samples for each split; samples of the same text stay together."""
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

    def parts_of(chosen, order):
        split_of = {i: j for group, j in zip(groups, chosen) for i in group}
        return [[samples[i] for i in order if split_of[i] == j] for j in range(len(sizes))]

    if args.is_shuffle:
        order = rng.permutation(len(samples))
        draws = (stratify(groups, label_ids, len(labels), sizes, rng) for _ in range(DRAWS))
        candidates = [parts_of(chosen, order) for chosen in draws]
        parts = min(candidates, key=lambda parts: share_gap(samples, parts))
    else:
        chosen = [sum(group[0] >= end for end in ends) for group in groups]
        parts = parts_of(chosen, range(len(samples)))
    if not all(parts):
        raise UserError(f"--splits: {len(samples)} samples are too few for {len(sizes)} splits")
    return parts


if __name__ == "__main__":
    utils.cli(main)
