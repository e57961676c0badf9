"""Checks a data folder before training: faults, duplicates, label counts, text lengths.

    python data/check.py --dataset_dir data --output_dir check

The report goes to stdout and, with --output_dir, to report.json and plots. The exit status is 2 if
train.py would reject a line.
"""

import io
import json
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError, at_least, logger

SHOWN = 10  # groups of duplicates and pairs of labels in the text report; report.json has all
SIZES = [64, 128, 256, 384, 512]  # sequence lengths, [CLS] and [SEP] included
# Words of scripts that are written with letters; a vocabulary has most of them in few tokens, while
# nearly every Chinese character is a token of its own.
WORDS = re.compile(r"[A-Za-z\u00c0-\u1fff]{2,}")
MUCH = 0.2  # share of the characters that stands in such words
PLOTTED = 60  # labels in a plot, the most frequent ones
LENGTHS = {
    "mean": np.mean,
    "median": np.median,
    "p95": lambda values: np.percentile(values, 95, method="higher"),
    "p99": lambda values: np.percentile(values, 99, method="higher"),
    "max": np.max,
}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--dev_file", default="dev.txt", help="development set")
    add("--test_file", help="test set; None: test.txt if it exists")
    add("--label_file", default="label.txt", help="label names; the line number is the class id")
    group = parser.add_argument_group("lengths")
    add = group.add_mutually_exclusive_group().add_argument
    add("--model_name", help="model folder (vocab.txt) to count tokens with; None: see params_path")
    add("--params_path", help="the same of a trained model; both None: count characters + 2")
    add = group.add_argument
    add("--max_seq_length", type=at_least(3), nargs="+", default=SIZES, help="lengths to try")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", help="folder for report.json and plots; None: report on stdout only")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    paths = {"train": data / args.train_file, "dev": data / args.dev_file}
    if args.test_file or (data / "test.txt").exists():
        paths["test"] = data / (args.test_file or "test.txt")
    if args.model_name and not Path(args.model_name).is_dir():
        hint = "give one with vocab.txt, or leave it out to count characters"
        raise UserError(f"--model_name {args.model_name}: no such folder; {hint}")
    folder = args.model_name or args.params_path
    tokenizer = utils.load_tokenizer(folder) if folder else None
    label_path = data / args.label_file
    labels = utils.read_labels(label_path)
    scans = {name: utils.scan_examples(path, labels) for name, path in paths.items()}
    lengths = {name: lengths_of(scan.texts, tokenizer) for name, scan in scans.items()}
    unit = "tokens" if folder else "characters + 2"
    report = make_report(labels, paths, scans, lengths, unit, args.max_seq_length)
    if args.output_dir:
        files = draw_plots(report, lengths, args.max_seq_length)
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        files["report.json"] = utils.printable(text)
        output = Path(args.output_dir)
        if output.is_dir():  # no input is in a folder that does not exist
            utils.check_outputs([output / name for name in files], [*paths.values(), label_path])
        utils.write_files(output, files)
        logger.info("Report and plots saved in %s", args.output_dir)
    print("\n".join(text_report(report)), flush=True)
    problems = sum(len(scan.problems) for scan in scans.values())
    if problems:
        reason = f"{problems} problem(s), listed at the end of the report"
        raise UserError(f"train.py rejects this data: {reason}")


# ----------------------------------------------------------------------------------------- facts
def lengths_of(texts, tokenizer):
    """Sequence lengths, [CLS] and [SEP] included."""
    if tokenizer is None:  # nearly the number of tokens for Chinese, too many for English
        return np.array([len(text) + 2 for text in texts])
    return np.array([len(ids) for ids in utils.encode(texts, tokenizer, sys.maxsize)[0]])


def word_share(texts):
    """The share of the characters that stands in words of letters, not in Chinese characters."""
    letters = sum(len("".join(WORDS.findall(text))) for text in texts)
    return letters / max(1, sum(map(len, texts)))


def looks_csv_quoted(text):
    """Whether a text stands in quotes as pandas' to_csv writes it; inner quotes are doubled."""
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return quoted and '"' not in text[1:-1].replace('""', "")


def lines_by_text(scan):
    """{text: {line: its set of class ids}}"""
    found = {}
    for text, ids, line in zip(scan.texts, scan.label_ids, scan.lines):
        found.setdefault(text, {})[line] = frozenset(ids)
    return found


def describe(path, scan, lengths, max_seq_lengths):
    """The facts of one file."""
    sizes = Counter(map(len, scan.label_ids))

    def lines_where(test):
        return [line for text, line in zip(scan.texts, scan.lines) if test(text)]

    return {
        "path": str(path),
        "samples": len(scan.texts),
        "blank_lines": scan.blank,
        "malformed": scan.problems,
        "empty_texts": lines_where(lambda text: not text),
        "carriage_returns": lines_where(lambda text: "\r" in text),
        "csv_quoted": lines_where(looks_csv_quoted),
        "unlabelled": sizes[0],
        "labels_per_sample": {str(size): sizes[size] for size in sorted(sizes)},
        "duplicates": [
            {"lines": list(lines), "same_labels": len(set(lines.values())) == 1, "text": text}
            for text, lines in lines_by_text(scan).items()
            if len(lines) > 1
        ],
        "word_share": word_share(scan.texts),
        "length": {name: float(of(lengths)) for name, of in LENGTHS.items() if len(lengths)},
        "longer_than": {str(size): int((lengths > size).sum()) for size in max_seq_lengths},
    }


def shared_texts(train, other):
    """The texts of `other` that are also in `train`."""
    in_train = lines_by_text(train)
    return [
        {
            "train_lines": list(in_train[text]),
            "lines": list(lines),
            "same_labels": len({*in_train[text].values(), *lines.values()}) == 1,
            "text": text,
        }
        for text, lines in lines_by_text(other).items()
        if text in in_train
    ]


def make_report(labels, paths, scans, lengths, unit, max_seq_lengths):
    """All facts, ready for JSON."""
    counts = {n: Counter(i for ids in s.label_ids for i in ids) for n, s in scans.items()}
    pairs = Counter(p for ids in scans["train"].label_ids for p in combinations(sorted(ids), 2))
    return {
        "length_unit": unit,
        "files": {
            name: describe(paths[name], scan, lengths[name], max_seq_lengths)
            for name, scan in scans.items()
        },
        "labels": [
            {"id": i, "label": label, **{name: counts[name][i] for name in scans}}
            for i, label in enumerate(labels)
        ],
        "absent": {n: [label for i, label in enumerate(labels) if not counts[n][i]] for n in scans},
        "shared_with_train": {
            name: shared_texts(scans["train"], scans[name]) for name in scans if name != "train"
        },
        "co_occurrence": [
            {"ids": list(pair), "labels": [labels[i] for i in pair], "train": count}
            for pair, count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


# ------------------------------------------------------------------------------------------ text
def share(count, total):
    return f"{count} ({100 * count / max(total, 1):.1f}%)"


def commas(items):
    return ", ".join(map(str, items))


def shown(lines):
    """The first lines, indented."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"    {line}" for line in [*lines[:SHOWN], *more]]


def doubtful(what, lines):
    """How many texts have something that was hardly meant, and where; nothing if none has."""
    if not lines:
        return []
    return [f"  texts {what}: {len(lines)}", *shown([f"line {line}" for line in lines])]


def repeated(title, groups, where):
    """How many texts are repeated, and the first of them; where(group): their lines as a str."""
    conflicting = sum(not group["same_labels"] for group in groups)
    marks = {True: "", False: " (conflicting labels)"}
    lines = [where(group) + marks[group["same_labels"]] for group in groups]
    return [f"{title}: {len(groups)} ({conflicting} with conflicting labels)", *shown(lines)]


def text_report(report):
    """The report as lines for the reader."""
    lines = []
    for name, facts in report["files"].items():
        total, sizes = facts["samples"], facts["labels_per_sample"]
        mean = sum(int(size) * count for size, count in sizes.items()) / max(total, 1)
        lengths = [f"{k} {value:.1f}".removesuffix(".0") for k, value in facts["length"].items()]
        cut = [f"{size}: {share(count, total)}" for size, count in facts["longer_than"].items()]
        sizes = commas(f"{size}: {count}" for size, count in sizes.items())
        lines += [
            f"{name}: {total} samples in {facts['path']}",
            f"  malformed lines: {len(facts['malformed'])}, blank lines: {facts['blank_lines']}",
            f"  empty texts: {len(facts['empty_texts'])}",
            *shown([f"line {line}" for line in facts["empty_texts"]]),
            *doubtful("with a carriage return (a space in results)", facts["carriage_returns"]),
            *doubtful(
                "in CSV quotes, which are read as text (pandas: quoting=3)", facts["csv_quoted"]
            ),
            f"  samples without labels: {share(facts['unlabelled'], total)}",
            f"  samples by number of labels: {sizes} (mean {mean:.3f})",
            f"  length in {report['length_unit']}: {commas(lengths)}",
            f"  cut at max_seq_length: {commas(cut)}",
        ]
        if report["length_unit"] != "tokens" and facts["word_share"] > MUCH:
            percent = f"{100 * facts['word_share']:.0f}%"
            lines += [
                f"    upper bounds: {percent} of the characters are in words of letters, which are "
                "fewer tokens; give --model_name FOLDER to count tokens"
            ]
        duplicates = facts["duplicates"]
        lines += repeated("  duplicate texts", duplicates, lambda g: f"lines {commas(g['lines'])}")
    for name, groups in report["shared_with_train"].items():
        lines += repeated(
            f"texts of {name} that are also in train",
            groups,
            lambda g: f"{name} {commas(g['lines'])} = train {commas(g['train_lines'])}",
        )
    totals = {name: facts["samples"] for name, facts in report["files"].items()}
    lines.append(f"{'id':>4}" + "".join(f"{name:>16}" for name in totals) + "  label")
    for row in report["labels"]:
        cells = "".join(f"{share(row[name], total):>16}" for name, total in totals.items())
        lines.append(f"{row['id']:>4}{cells}  {row['label']}")
    for name, absent in report["absent"].items():
        lines.append(f"labels missing from {name}: {commas(absent) or 'none'}")
    pairs = [f"{pair['train']}: {' + '.join(pair['labels'])}" for pair in report["co_occurrence"]]
    lines += ["labels that occur together in train:", *shown(pairs)]
    for facts in report["files"].values():
        lines += facts["malformed"]
    return lines


# ----------------------------------------------------------------------------------------- plots
def find_font(text):
    """A font that has every character of `text`, or None; most installations have no Chinese."""
    from matplotlib import font_manager, ft2font

    def unusual(entry):  # a regular upright face is preferred
        return entry.weight not in (400, "normal", "regular"), entry.style != "normal", entry.fname

    installed = sorted(font_manager.fontManager.ttflist, key=unusual)
    for path in [font_manager.findfont("DejaVu Sans"), *(entry.fname for entry in installed)]:
        try:
            font = ft2font.FT2Font(path)
        except (OSError, RuntimeError):  # removed since, or broken
            continue
        # macOS has a font that draws a box for every character.
        if "lastresort" not in path.lower() and all(font.get_char_index(ord(c)) for c in set(text)):
            return font_manager.FontProperties(fname=path)
    return None


def name_ticks(axis, rows, font):
    """The labels' names at an axis, or their class ids where no font has the names."""
    names = [f"{r['id']} {r['label']}" if font else str(r["id"]) for r in rows]
    axis.set_ticks(range(len(rows)), names)
    for tick in axis.get_ticklabels():
        tick.set(parse_math=False, fontproperties=font)


def plot_labels(figure, report, rows, font):
    figure.set_size_inches(9, 2 + 0.3 * len(rows))
    axes = figure.subplots()
    height = 0.8 / len(report["files"])
    for n, (name, facts) in enumerate(report["files"].items()):
        values = [100 * row[name] / max(facts["samples"], 1) for row in rows]
        axes.barh(np.arange(len(rows)) + n * height - 0.4 + height / 2, values, height, label=name)
    name_ticks(axes.yaxis, rows, font)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("% of the samples")
    axes.legend()


def plot_samples(figure, report, lengths, max_seq_lengths):
    figure.set_size_inches(11, 4)
    left, right = figure.subplots(1, 2)
    counts = [int(k) for facts in report["files"].values() for k in facts["labels_per_sample"]]
    highest = max(counts, default=0)
    bins = np.linspace(0, max(values.max(initial=1) for values in lengths.values()), 61)
    for name, facts in report["files"].items():
        total, sizes = max(facts["samples"], 1), facts["labels_per_sample"]
        shares = [100 * sizes.get(str(size), 0) / total for size in range(highest + 1)]
        left.plot(range(highest + 1), shares, marker="o", label=name)
        weights = np.full(len(lengths[name]), 100 / total)
        right.hist(lengths[name], bins, weights=weights, histtype="step", label=name)
    for size in max_seq_lengths:
        right.axvline(size, color="gray", linestyle=":", linewidth=1)
    left.set(xlabel="labels per sample", ylabel="% of the samples")
    right.set(xlabel=f"length in {report['length_unit']}", ylabel="% of the samples")
    left.legend()
    right.legend()


def plot_co_occurrence(figure, report, rows, font):
    index = {row["id"]: n for n, row in enumerate(rows)}
    shares = np.zeros((len(rows), len(rows)))
    for pair in report["co_occurrence"]:
        a, b = (index.get(i) for i in pair["ids"])
        if a is not None and b is not None:
            shares[a, b] = shares[b, a] = pair["train"]
    shares *= 100 / np.maximum([[row["train"]] for row in rows], 1)
    size = 4 + 0.25 * len(rows)
    figure.set_size_inches(size + 1, size)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=100, cmap="Blues"), shrink=0.6)
    name_ticks(axes.yaxis, rows, font)
    axes.set_xticks(range(len(rows)), [str(row["id"]) for row in rows], rotation=90)
    axes.set_title("% of the row's label that has the column's label too (train)")


def draw_plots(report, lengths, max_seq_lengths):
    """{file name: PNG}"""
    from matplotlib.figure import Figure  # takes a second to import

    rows = sorted(report["labels"], key=lambda row: -row["train"])[:PLOTTED]
    # "lp": Matplotlib measures the height of a line by these two.
    font = find_font("lp 0123456789" + "".join(row["label"] for row in rows))
    if font is None:
        logger.warning("No installed font has all label names; the plots show class ids instead")
    figures = {name: Figure(layout="tight") for name in ("labels", "samples", "co_occurrence")}
    plot_labels(figures["labels"], report, rows, font)
    plot_samples(figures["samples"], report, lengths, max_seq_lengths)
    plot_co_occurrence(figures["co_occurrence"], report, rows, font)
    files = {}
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png")
        files[f"{name}.png"] = content.getvalue()
    return files


if __name__ == "__main__":
    utils.cli(main)
