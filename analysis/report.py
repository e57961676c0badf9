"""The HTML page of `evaluate.py --report_path`: one file that needs no network and no library.

`render` takes plain data and returns the page, whose frame (style, script) is report_frame.html.
What comes from files is escaped. Every list but the tables of labels is bounded.
"""

import base64
import hashlib
import re
from html import escape
from pathlib import Path

import numpy as np
from scipy import sparse
from sklearn.metrics import average_precision_score, precision_recall_curve

import metric

FRAME = Path(__file__).with_name("report_frame.html")
CURVES = 50  # labels with curves, those of the lowest average precision
POINTS = 100  # of a curve
PAIRS = 50  # rows of a table of label pairs
CASES = 100  # texts that are labelled wrongly
CASE_LABELS = 20  # labels that are listed for one of them
CASE_TEXT = 2000  # characters of a text
BLOCK = 256  # labels whose pairs are counted at a time
KEYS = ("precision", "recall", "f1")
SETS = {"dev": "dev", "train": "train", "out_of_sample": "dev, tuned thresholds, out of sample"}
SECTIONS = {
    "labels": "Labels",
    "curves": "Precision and recall, F1 and threshold",
    "thresholds": "Choice of thresholds",
    "confused": "Missed, and another given",
    "pairs": "Labels that occur together",
    "cases": "Worst cases",
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
    """Of the texts with the gold labels a and b: how many are given both, one and none of them.

    gold, given: 0/1 CSC [texts, classes].
    """

    def texts(matrix, label):
        return matrix.indices[matrix.indptr[label] : matrix.indptr[label + 1]]

    together = np.intersect1d(texts(gold, a), texts(gold, b))
    right = sum(np.isin(together, texts(given, label)).astype(int) for label in (a, b))
    return [int(np.sum(right == number)) for number in (2, 1, 0)]


def f1_at(probs, targets, thresholds):
    """F1 of one label at each of the thresholds; probs, boolean targets: [texts]."""
    order = np.argsort(probs)
    # As metric.decode: strictly greater, in float32.
    below = np.searchsorted(probs[order], np.asarray(thresholds, np.float32), side="right")
    positives_below = np.concatenate([[0], np.cumsum(targets[order])])[below]
    tp, total = targets.sum() - positives_below, targets.sum()
    return metric.precision_recall_f1(tp, len(probs) - below - tp, total - tp)[2]


def worst_cases(gold, given, probs, thresholds):
    """(the CASES worst texts as [(text, [(class, given, probability)])], number of wrong texts).

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


# ------------------------------------------------------------------------------------------- HTML
def number(value, form):
    return "–" if np.isnan(value) else format(value, form)


def table(key, heads, rows):
    """A table that sorts by click; heads: titles, a number's with its format ("F1:.2f")."""
    titles, forms = zip(*((title, form) for title, _, form in (h.partition(":") for h in heads)))
    head = body = ""
    for title, form in zip(titles, forms):
        name = re.sub(r"\W+", "_", title.lower())
        name = name if key == "labels" else f"{key}_{name}"  # unique in the page
        button = f'<button type="button" data-sort="{name}">{escape(title)}</button>'
        head += f'<th scope="col"{" class=n" if form else ""}>{button}</th>'
    for row in rows:
        cells = (
            f"<td class=n>{number(value, form)}" if form else f"<td>{escape(value)}"
            for value, form in zip(row, forms)
        )
        body += f"<tr>{'</td>'.join(cells)}</td></tr>\n"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{key}"><table><thead><tr>'
        f"{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def at(x, y):
    """Coordinates in a plot of a point of the unit square."""
    return f"{34 + 180 * x:.1f} {8 + 130 * (1 - y):.1f}"


def plot(title, x_title, y_title, curve, marks):
    """A small SVG of the unit square; marks: {CSS class: (x, y)}, one round, the other square."""
    ticks = "".join(
        f'<path class="axis" d="M{at(0, v)}L{at(1, v)}M{at(v, 0)}L{at(v, 1)}"/>'
        f'<text x="{34 + 180 * v}" y="151" text-anchor="middle">{v:g}</text>'
        f'<text x="29" y="{142 - 130 * v}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    points = []
    for name, (x, y) in marks.items():
        cx, cy = at(x, y).split()
        if name == "now":
            points.append(f'<circle class="now" cx="{cx}" cy="{cy}" r="4"/>')
        else:
            x, y = float(cx) - 3.5, float(cy) - 3.5
            points.append(f'<rect class="best" x="{x:.1f}" y="{y:.1f}" width="7" height="7"/>')
    return (
        f'<svg viewBox="0 0 222 166" role="img" aria-label="{escape(title)}">{ticks}'
        f'<text x="124" y="163" text-anchor="middle">{x_title}</text>'
        f'<text transform="translate(9 73) rotate(-90)" text-anchor="middle">{y_title}</text>'
        f'<path class="curve" d="{curve}"/>{"".join(points)}</svg>'
    )


def curves(row, fact, probs, targets, threshold):
    """The figure of one label; row: its figures, fact: of label_facts; probs, targets: [texts]."""
    precision, recall, _ = precision_recall_curve(targets, probs, drop_intermediate=True)
    shown = np.unique(np.linspace(0, len(recall) - 1, POINTS).astype(int))
    line = f"M{at(recall[0], precision[0])}"
    for before, i in zip(shown, shown[1:]):  # in steps, as average precision sums them up
        line += f"L{at(recall[i], precision[before])}L{at(recall[i], precision[i])}"
    grid = np.linspace(0, 1, POINTS)
    f1_line = "M" + "L".join(at(x, y) for x, y in zip(grid, f1_at(probs, targets, grid)))
    label, best = row["label"], (fact["best"], fact["best_f1"])
    now = {"now": (row["recall"], row["precision"])}
    marks = {"best": best, "now": (threshold, row["f1"])}
    return (
        f"<figure><figcaption><b>{escape(label)}</b>: average precision {100 * fact['ap']:.2f}, "
        f"support {row['support']}<br>"
        f'<span class="now">●</span> threshold {threshold:.3f}: F1 {100 * row["f1"]:.2f} &nbsp; '
        f'<span class="best">■</span> best here {best[0]:.3f}: F1 {100 * best[1]:.2f}</figcaption>'
        + plot(f"{label}: precision and recall", "recall", "precision", line, now)
        + plot(f"{label}: F1 by threshold", "threshold", "F1", f1_line, marks)
        + "</figure>\n"
    )


def label_facts(probs, targets):
    """Average precision (nan without positives), best threshold and its F1 of one label."""
    ap = float(average_precision_score(targets, probs)) if targets.any() else np.nan
    best, best_f1 = metric.best_threshold(probs, targets)
    return {"ap": ap, "best": best, "best_f1": best_f1}


def tags(ids, labels, wrong):
    shown = (
        f'<span class="tag{" wrong" if i in wrong else ""}">{escape(labels[i])}</span>'
        for i in ids[:CASE_LABELS]
    )
    more = f" and {len(ids) - CASE_LABELS} more" if len(ids) > CASE_LABELS else ""
    return ("".join(shown) or "none") + more


def case(text, gold, given, wrong, labels, thresholds):
    """One wrongly labelled text; gold, given: class ids; wrong: of worst_cases."""
    lines = (
        f"{'wrongly given' if is_given else 'missed'}: <b>{escape(labels[i])}</b>, "
        f"probability {probability:.3f}, threshold {thresholds[i]:.3f}"
        for i, is_given, probability in wrong[:CASE_LABELS]
    )
    ids = {i for i, *_ in wrong}
    if len(text) > CASE_TEXT:
        text = f"{text[:CASE_TEXT]} … ({len(text)} characters)"
    return (
        f"<article><blockquote>{escape(text)}</blockquote>"
        f"<div>Gold: {tags(gold, labels, ids)}</div>"
        f"<div>Predicted: {tags(given, labels, ids)}</div>"
        f'<div class="small">{"<br>".join(lines)}</div></article>\n'
    )


def section(key, text, *content):
    parts = "".join(content)
    return f'<section id="{key}"><h2>{SECTIONS[key]}</h2>\n<p>{text}</p>\n{parts}</section>\n'


def overall(reports):
    rows = []
    for key, title in SETS.items():
        if found := reports.get(key):
            exact, texts = 100 * found["subset_accuracy"], found["samples"]
            for average in ("micro", "macro"):
                values = (100 * found[average][key] for key in KEYS)
                rows.append([title, average, *values, exact, texts])
    figures = ["precision:.2f", "recall:.2f", "F1:.2f", "all labels right:.2f"]
    return table("overall", ["set", "average", *figures, "texts:d"], rows)


def labels_section(classes, facts, thresholds):
    heads = ["id:d", "label", "support:d", "predicted:d", "precision:.2f", "recall:.2f", "F1:.2f"]
    rows = []
    for i, (row, fact) in enumerate(zip(classes, facts)):
        figures = (100 * value for value in (*(row[key] for key in KEYS), fact["ap"]))
        rows.append([i, row["label"], row["support"], row["predicted"], *figures, thresholds[i]])
    text = (
        "In percent; a click on a column head sorts. Average precision does not depend on the "
        "threshold. A dash: no text of the set has the label."
    )
    heads += ["average precision:.2f", "threshold:.3f"]
    return section("labels", text, table("labels", heads, rows))


def thresholds_section(classes, facts, thresholds, tuned):
    heads = ["label", "threshold:.3f", "F1:.2f", "best threshold here:.3f", "F1 there:.2f"]
    rows = [
        [row["label"], threshold, 100 * row["f1"], fact["best"], 100 * fact["best_f1"]]
        for row, threshold, fact in zip(classes, thresholds, facts)
    ]
    text = (
        "The best threshold is chosen on this very set, so its F1 is optimistic, most of all for "
        "rare labels. "
    )
    if tuned:
        heads.append("F1 tuned, out of sample:.2f")
        rows = [[*row, 100 * found["f1"]] for row, found in zip(rows, tuned["classes"])]
        text += "The last column is what tuning gives on texts that it has not seen."
    else:
        text += "<code>--tune_thresholds</code> tells what tuning gives on texts it has not seen."
    return section("thresholds", text, table("thresholds", heads, rows))


def pair_sections(gold, given, labels):
    """Two tables; gold, given: 0/1 CSR [texts, classes]."""
    missed, extra = ((gold - given) > 0).astype(np.int32), ((given - gold) > 0).astype(np.int32)
    rows = [[labels[a], labels[b], texts] for a, b, texts in top_pairs(missed, extra)]
    text = (
        "Texts in which one gold label is missed and another label is given wrongly; the "
        f"{PAIRS} most frequent pairs."
    )
    table_of_confused = table("confused", ["missed", "wrongly given", "texts:d"], rows)
    yield section("confused", text, table_of_confused)
    by_label = gold.tocsc(), given.tocsc()
    rows = [
        [labels[a], labels[b], texts, *both_one_none(*by_label, a, b)]
        for a, b, texts in top_pairs(gold, gold, upper=True)
    ]
    text = (
        "Texts that have both gold labels, and in how many of them the model gives both, one or "
        f"none; the {PAIRS} most frequent pairs."
    )
    heads = ["label", "with", "texts:d", "both given:d", "one given:d", "none given:d"]
    yield section("pairs", text, table("pairs", heads, rows))


def page(content):
    """The frame around the content; its policy allows no script but the frame's own, no network."""
    before, after = FRAME.read_text(encoding="utf-8").split("CONTENT")
    script = re.search("<script>(.*)</script>", after, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return before.replace("POLICY", policy) + content + after


def render(about, reports, texts, label_ids, predicted, probs, thresholds):
    """The whole page as a str.

    about: {title: str} for the head. reports: MultiLabelCounts.report() of "dev" and, if wanted,
    of "train" and "out_of_sample" (tuned thresholds). The rest is dev's: texts, label_ids and
    predicted (class ids per text), probs float32 [texts, classes], thresholds [classes].
    """
    classes, thresholds = reports["dev"]["classes"], np.asarray(thresholds, dtype=np.float32)
    labels, limits = [row["label"] for row in classes], thresholds.tolist()
    gold, given = indicator(label_ids, len(labels)), indicator(predicted, len(labels))
    by_label = gold.tocsc()

    def of_label(i):
        targets = np.zeros(len(texts), dtype=bool)
        targets[by_label.indices[by_label.indptr[i] : by_label.indptr[i + 1]]] = True
        return np.ascontiguousarray(probs[:, i]), targets

    facts = [label_facts(*of_label(i)) for i in range(len(labels))]
    found = [i for i, fact in enumerate(facts) if not np.isnan(fact["ap"])]
    hardest = sorted(found, key=lambda i: facts[i]["ap"])[:CURVES]
    figures = (curves(classes[i], facts[i], *of_label(i), limits[i]) for i in hardest)
    shown_curves = (
        f"The {len(hardest)} labels of the lowest average precision, of the {len(found)} that some "
        "text has; the lowest first."
    )
    cases, wrong = worst_cases(gold, given, probs, thresholds)
    articles = (case(texts[i], label_ids[i], predicted[i], w, labels, limits) for i, w in cases)
    shown_cases = (
        f"{wrong} of {len(texts)} texts are labelled wrongly; here are the {len(cases)} with a "
        "probability farthest on the wrong side of its threshold."
    )
    sections = [
        labels_section(classes, facts, limits),
        section("curves", shown_curves, '<div class="curves">', *figures, "</div>"),
        thresholds_section(classes, facts, limits, reports.get("out_of_sample")),
        *pair_sections(gold, given, labels),
        section("cases", shown_cases, *articles),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in SECTIONS.items())
    head = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    head = f"<h1>Evaluation report</h1>\n<dl>{head}</dl>\n<nav>{links}</nav>\n"
    return page("".join([head, overall(reports), *sections]))
