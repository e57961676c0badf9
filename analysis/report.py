"""The HTML page of `evaluate.py --report_path`: one file that needs no network and no library.

`render` takes plain data and returns the page: pages/evaluation.html, a Jinja2 template that
escapes what comes from files. It holds every phrase in Chinese and in English and shows one of
them. Every list but the tables of labels is bounded.
"""

import base64
import hashlib
import re
from pathlib import Path

import jinja2
import markupsafe
import numpy as np
from scipy import sparse
from sklearn.metrics import average_precision_score, precision_recall_curve
from thresholds import best_threshold

import metric

PAGES = Path(__file__).with_name("pages")
CURVES = 50  # labels with curves, those of the lowest average precision
POINTS = 100  # of a curve
PAIRS = 50  # rows of a table of label pairs
CASES = 100  # texts that are labelled wrongly
CASE_LABELS = 20  # labels that are listed for one of them
CASE_TEXT = 2000  # characters of a text
BLOCK = 256  # labels whose pairs are counted at a time
# What the reader sees in two languages: (Chinese, English).
SETS = {
    "dev": ("开发集", "dev"),
    "train": ("训练集", "train"),
    "out_of_sample": ("开发集，调阈值，样本外", "dev, tuned thresholds, out of sample"),
}
SECTIONS = {
    "overall": ("总体", "Overall"),
    "labels": ("标签", "Labels"),
    "curves": ("精确率与召回率，F1 与阈值", "Precision and recall, F1 and threshold"),
    "thresholds": ("阈值的选择", "Choice of thresholds"),
    "confused": ("漏掉一个，错给另一个", "Missed, and another given"),
    "pairs": ("一起出现的标签", "Labels that occur together"),
    "cases": ("错得最远的文本", "Worst cases"),
}


# ---------------------------------------------------------------------------------------- figures
def indicator(label_ids, num_labels):
    """0/1 CSR matrix [texts, classes] of class ids, a sequence per text."""
    sizes = [len(ids) for ids in label_ids]
    columns = np.concatenate([np.asarray(ids, np.int32) for ids in label_ids])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shape = len(sizes), num_labels
    return sparse.csr_matrix((np.ones(len(columns), np.int32), columns, starts), shape)


def top_pairs(left, right, upper=False):
    """[(a, b, texts)], most frequent first: label a in `left` and b in `right` of the same text.

    left, right: 0/1 CSR [texts, classes]. `upper` keeps a < b. In blocks of labels, so that no
    matrix of all pairs is held.
    """
    rows, found = left.T.tocsr(), []
    for start in range(0, rows.shape[0], BLOCK):
        product = (rows[start : start + BLOCK] @ right).tocoo()
        a, b, count = product.row + start, product.col, product.data
        if upper:
            a, b, count = (values[product.col > product.row + start] for values in (a, b, count))
        order = np.lexsort([b, a, -count])[:PAIRS]
        found += zip(a[order].tolist(), b[order].tolist(), count[order].tolist())
    return sorted(found, key=lambda pair: (-pair[2], pair[:2]))[:PAIRS]


def both_one_none(gold, given, a, b):
    """Of the texts with the gold labels a and b: how many are given both, one and none of them."""
    together = gold[:, [a]].multiply(gold[:, [b]]).nonzero()[0]
    right = given[together][:, [a, b]].sum(axis=1)
    return np.bincount(np.ravel(right), minlength=3)[::-1].tolist()


def f1_at(probs, targets, thresholds):
    """F1 of one label at each of the thresholds; probs, boolean targets: [texts]."""
    order = np.argsort(probs)
    # As metric.decode: strictly greater, in float32.
    below = np.searchsorted(probs[order], np.asarray(thresholds, np.float32), side="right")
    positives_below = np.concatenate([[0], np.cumsum(targets[order])])[below]
    tp, total = targets.sum() - positives_below, targets.sum()
    return metric.precision_recall_f1(tp, len(probs) - below - tp, total - tp)[2]


def worst_cases(gold, given, probs, thresholds):
    """(the CASES worst texts as [(text, [(class, given, probability)])], count of wrong texts).

    gold, given: CSR [texts, classes]. A label's margin is how far its probability is on the wrong
    side of its threshold; a text goes by its largest, and its labels are listed in that order.
    """
    wrong = (given - gold).tocsr()
    wrong.eliminate_zeros()
    rows = np.repeat(np.arange(len(probs)), np.diff(wrong.indptr))
    margins = wrong.data * (probs[rows, wrong.indices] - thresholds[wrong.indices])
    texts = np.unique(rows)
    largest = np.maximum.reduceat(margins, wrong.indptr[texts]) if len(texts) else margins
    cases = []
    for text in texts[np.argsort(-largest, kind="stable")[:CASES]].tolist():
        inside = slice(wrong.indptr[text], wrong.indptr[text + 1])
        order = np.argsort(-margins[inside], kind="stable")
        ids, signs = wrong.indices[inside][order].tolist(), wrong.data[inside][order].tolist()
        labels = [(i, sign > 0, float(probs[text, i])) for i, sign in zip(ids, signs)]
        cases.append((text, labels))
    return cases, len(texts)


# ------------------------------------------------------------------------------------------ curves
def at(x, y):
    """Coordinates in a plot of a point of the unit square."""
    return f"{34 + 180 * x:.1f} {8 + 130 * (1 - y):.1f}"


def curves(fact, probs, targets):
    """The figures of one label with the SVG paths of its curves; probs, targets: [texts]."""
    precision, recall, _ = precision_recall_curve(targets, probs, drop_intermediate=True)
    shown = np.unique(np.linspace(0, len(recall) - 1, POINTS).astype(int))
    line = f"M{at(recall[0], precision[0])}"
    for before, i in zip(shown, shown[1:]):  # in steps, as average precision sums them up
        line += f"L{at(recall[i], precision[before])}L{at(recall[i], precision[i])}"
    grid = np.linspace(0, 1, POINTS)
    f1_line = "M" + "L".join(at(x, y) for x, y in zip(grid, f1_at(probs, targets, grid)))
    return {**fact, "pr_line": line, "f1_line": f1_line}


# -------------------------------------------------------------------------------------------- page
def both(chinese, english, tag="span", **values):
    """A phrase in both languages, as HTML; the page shows one of them.

    values: what {name} in the phrases stands for. tag: "tspan" inside SVG.
    """
    halves = [markupsafe.Markup(half) for half in (chinese, english)]
    if values:
        halves = [half.format(**values) for half in halves]
    form = f'<{tag} lang="zh">{{}}</{tag}><{tag} lang="en">{{}}</{tag}>'
    return markupsafe.Markup(form).format(*halves)


def decision_rule(info):
    """How a model (utils.ModelInfo) decides, as HTML in both languages."""
    limits = ""
    if info.min_labels or info.max_labels is not None:
        limits = "".join(f"; {name} {value}" for name, value in info.limits.items())
    if info.thresholds is None:
        default = metric.DEFAULT_THRESHOLD
        return both(
            "概率 > {n}（默认）{limits}", "probability > {n} (default){limits}",
            n=default, limits=limits,
        )  # fmt: skip
    return both(
        "概率 > 该标签调过的阈值（在选阈值的数据集上偏乐观）{limits}",
        "probability > the label's tuned threshold (on the set they come from: optimistic){limits}",
        limits=limits,
    )


def figure(value, form):
    """A number of a table as text; form: "%" for percent, "+%" for percentage points with a sign,
    else a format. nan: a dash. A str, which may begin with a number, stays as it is."""
    if isinstance(value, str):
        return value
    if np.isnan(value):
        return "–"
    if form.endswith("%"):
        return f"{round(100 * value, 2) + 0.0:{form[:-1]}.2f}"  # + 0.0: no -0.00
    return format(value, form)


def sort_key(title, table):
    """What the address says of a column by which a table is sorted; unique in the page."""
    name = re.sub(r"\W+", "_", title.lower())
    return name if table == "labels" else f"{table}_{name}"


def fill_page(name, values):
    """A page with the values; its policy allows no script but its own and no network."""
    frame = (PAGES / "frame.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", frame, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(figure=figure, sort_key=sort_key)
    environment.globals.update(at=at, t=both, max_text=CASE_TEXT, max_labels=CASE_LABELS)
    return environment.get_template(name).render(values, script_sha256=digest)


def render(about, reports, texts, label_ids, predicted, probs, thresholds):
    """The whole page as a str.

    about: [((Chinese, English) title, value)] for the head. reports: MultiLabelCounts.report() of
    "dev" and, if wanted, of "train" and "out_of_sample" (tuned thresholds). The rest is dev's:
    texts, label_ids and predicted (class ids per text), probs float32 [texts, classes], thresholds
    [classes].
    """
    classes, thresholds = reports["dev"]["classes"], np.asarray(thresholds, dtype=np.float32)
    labels, tuned = [row["label"] for row in classes], reports.get("out_of_sample")
    gold, given = indicator(label_ids, len(labels)), indicator(predicted, len(labels))
    by_label = gold.tocsc()

    def of_label(i):
        return np.ascontiguousarray(probs[:, i]), by_label[:, [i]].toarray()[:, 0] > 0

    facts = []  # of each label; the average precision is nan where no text has it
    for i, threshold in enumerate(thresholds.tolist()):
        scores, targets = of_label(i)
        ap = float(average_precision_score(targets, scores)) if targets.any() else np.nan
        best, best_f1 = best_threshold(scores, targets)
        own = {"id": i, "threshold": threshold, "ap": ap, "best": best, "best_f1": best_f1}
        facts.append({**classes[i], **own, "tuned_f1": tuned and tuned["classes"][i]["f1"]})
    found = [fact for fact in facts if not np.isnan(fact["ap"])]
    hardest = sorted(found, key=lambda fact: fact["ap"])[:CURVES]
    missed, extra = ((gold - given) > 0).astype(np.int32), ((given - gold) > 0).astype(np.int32)
    cases, num_wrong = worst_cases(gold, given, probs, thresholds)
    return fill_page(
        "evaluation.html",
        {
            "title": ("评估报告", "Evaluation report"),
            "about": about,
            "sections": SECTIONS,
            "sets": [(title, reports[key]) for key, title in SETS.items() if reports.get(key)],
            "facts": facts,
            "tuned": tuned is not None,
            "num_found": len(found),
            "curves": [curves(fact, *of_label(fact["id"])) for fact in hardest],
            "max_pairs": PAIRS,
            "confused": top_pairs(missed, extra),
            "pairs": [
                (a, b, count, *both_one_none(by_label, given, a, b))
                for a, b, count in top_pairs(gold, gold, upper=True)
            ],
            "labels": labels,
            "thresholds": thresholds.tolist(),
            "num_wrong": num_wrong,
            "num_texts": len(texts),
            "cases": [(texts[i], label_ids[i], predicted[i], wrong) for i, wrong in cases],
        },
    )
