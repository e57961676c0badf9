"""evaluate.py --report_path: the page's figures, its escaping, its bounds, and it in a browser."""

import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import evaluate
import numpy as np
import pytest
import report
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve
from thresholds import best_threshold

import metric

HOSTILE = ["<script>alert(1)</script>", "\"' onclick='alert(1)", "&lt;b&gt; {{cases}}", "甲"]
HOSTILE_TEXT = '</blockquote><img src=x onerror="alert(1)">\'"</script><!-- {{script_sha256}}'


class Page(HTMLParser):
    """tables: {key: (heads, rows)}; articles, figures: their text; curves: paths; tags: all.

    Of the texts the half in one language: "en" or "zh"."""

    def __init__(self, html, language="en"):
        super().__init__()
        self.hidden, self.depth = {"en": "zh", "zh": "en"}[language], None
        self.tables, self.articles, self.figures, self.curves = {}, [], [], []
        self.tags, self.open, self.attributes, self.words = [], [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs.items()
        if tag not in ("meta", "br", "path", "circle", "rect"):
            self.open.append(tag)
            if attrs.get("lang") == self.hidden:
                self.depth = len(self.open)
        if tag == "div" and attrs.get("role") == "region":
            self.heads, self.rows = self.tables[attrs["data-table"]] = [], []
        elif tag == "tr" and "tbody" in self.open:
            self.rows.append([])
        elif tag == "button" and self.open[-2] == "th":
            self.heads.append(attrs["data-sort"])
        elif tag == "path" and attrs["class"] == "curve":
            self.curves.append(attrs["d"])
        if tag in ("td", "article", "figcaption"):
            self.words = ""

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle", "rect"):
            assert self.open.pop() == tag
            if len(self.open) + 1 == self.depth:
                self.depth = None
        if tag == "td":
            self.rows[-1].append(self.words)
        elif tag in ("article", "figcaption"):
            {"article": self.articles, "figcaption": self.figures}[tag].append(self.words)

    def handle_data(self, data):
        if self.depth is None:
            self.words += data

    def column(self, table, head):
        heads, rows = self.tables[table]
        return [row[heads.index(head)] for row in rows]


def random_set(texts, classes, seed=1, rate=0.25):
    """(targets, probs float32) [texts, classes]; the first label has no positive text."""
    rng = np.random.default_rng(seed)
    targets = rng.random((texts, classes)) < rate
    targets[:, 0] = False
    probs = 0.6 * rng.random((texts, classes)) + 0.4 * targets * rng.random((texts, classes))
    return targets, probs.round(3).astype(np.float32)


def render(targets, probs, labels, texts=None, thresholds=None, **reports):
    thresholds = thresholds or [0.5] * len(labels)
    decisions, counts = metric.decode(probs, thresholds), metric.MultiLabelCounts(len(labels))
    counts.update(decisions, targets)
    gold, given = ([np.flatnonzero(row).tolist() for row in rows] for rows in (targets, decisions))
    texts = texts or [f"文{i}" for i in range(len(targets))]
    reports = {"dev": counts.report(labels), **reports}
    about = [(("数据集", "Set"), "dev.txt")]
    return report.render(about, reports, texts, gold, given, probs, thresholds)


# ---------------------------------------------------------------------------------------- figures
def test_page_of_evaluate(checkpoint, small_data, tmp_path, run_cli):
    """Its tables hold the figures of the JSON report."""
    flags = ["--device", "cpu", "--dataset_dir", small_data, "--params_path", checkpoint]
    flags += ["--bad_case_path", tmp_path / "bad.txt", "--json_path", tmp_path / "r.json"]
    flags += ["--tune_thresholds", "--report_path", tmp_path / "r.html"]
    status, error = run_cli(evaluate.main, flags)
    assert status == 0 and f"Page saved in {tmp_path / 'r.html'}" in error
    html = (tmp_path / "r.html").read_text("utf-8")
    page, figures = Page(html), json.loads((tmp_path / "r.json").read_text("utf-8"))
    rule = '<span lang="zh">概率 > 0.5（默认）</span>'
    rule += '<span lang="en">probability > 0.5 (default)</span>'
    for fact in (small_data / "dev.txt", checkpoint, rule):
        assert f"<dd>{fact}</dd>" in html
    sets = [figures["dev"], figures["train"], figures["tuned"]["out_of_sample"]]
    shown = [row[2:] for row in page.tables["overall"][1]]
    keys = ("precision", "recall", "f1")
    assert shown == [
        [*(f"{100 * r[a][k]:.2f}" for k in keys), f"{100 * r['subset_accuracy']:.2f}",
         str(r["samples"])] for r in sets for a in ("micro", "macro")
    ]  # fmt: skip
    classes = figures["dev"]["classes"]
    for key in ("label", "support", "predicted"):
        assert page.column("labels", key) == [str(c[key]) for c in classes]
    for key in keys:
        assert page.column("labels", key) == [f"{100 * c[key]:.2f}" for c in classes]
    best = [f"{t:.3f}" for t in figures["tuned"]["thresholds"].values()]
    assert page.column("thresholds", "thresholds_best_threshold_here") == best
    out = [f"{100 * c['f1']:.2f}" for c in figures["tuned"]["out_of_sample"]["classes"]]
    assert page.column("thresholds", "thresholds_f1_tuned_out_of_sample") == out
    bad_cases = (tmp_path / "bad.txt").read_text("utf-8").splitlines()[1:]
    assert len(page.articles) == min(len(bad_cases), report.CASES)
    for line in bad_cases:
        assert any(line.split("\t")[2] in article for article in page.articles)


def test_average_precision_and_best_threshold():
    targets, probs = random_set(60, 8)
    page = Page(render(targets, probs, list("abcdefgh")))
    ap = [f"{100 * average_precision_score(targets[:, i], probs[:, i]):.2f}" for i in range(1, 8)]
    assert page.column("labels", "average_precision") == ["–", *ap]
    best = [best_threshold(probs[:, i], targets[:, i]) for i in range(8)]
    shown = page.column("thresholds", "thresholds_best_threshold_here")
    assert shown == [f"{threshold:.3f}" for threshold, _ in best]
    f1 = page.column("thresholds", "thresholds_f1_there")
    assert f1 == [f"{100 * value:.2f}" for _, value in best]
    # The label of the lowest average precision comes first; the one without texts has no curve.
    order = [figure.split(":")[0] for figure in page.figures]
    assert order == [label for _, label in sorted(zip(map(float, ap), "bcdefgh"))]


def points_of(path):
    """Where a curve goes, as (x, y) in the unit square."""
    points = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), dtype=float)
    return (points - [34, 138]) / [180, -130]


def decided_f1(probs, targets, threshold):
    counts = metric.MultiLabelCounts(probs.shape[1])
    counts.update(metric.decode(probs, threshold), targets)
    return counts.micro_f1


@pytest.mark.parametrize("texts", [20, 5000])
def test_curves_go_through_the_true_points(texts):
    targets, probs = random_set(texts, 2, rate=0.5)
    page = Page(render(targets, probs, ["a", "b"], thresholds=[0.5, 0.3]))
    pr, f1 = map(points_of, page.curves)
    assert len(pr) <= 2 * report.POINTS and len(f1) <= report.POINTS
    precision, recall, _ = precision_recall_curve(targets[:, 1], probs[:, 1])
    truth = np.stack([recall, precision], axis=1)
    for point in pr[::2]:
        assert np.abs(truth - point).max(axis=1).min() < 1e-3
    corners = np.stack([pr[2::2, 0], pr[:-1:2, 1]], axis=1)  # in steps from right to left
    assert (pr[1::2] == corners).all()
    np.testing.assert_allclose(pr[[0, -1]], truth[[0, -1]], atol=1e-3)
    for threshold, value in f1:
        threshold = round(threshold * (report.POINTS - 1)) / (report.POINTS - 1)
        expected = decided_f1(probs[:, 1:], targets[:, 1:], threshold)
        assert value == pytest.approx(expected, abs=1e-3)


def test_f1_at_a_threshold_that_is_a_probability():
    targets, probs = random_set(50, 2)
    thresholds = [*probs[:20, 1], 0.0, 1.0]
    expected = [decided_f1(probs[:, 1:], targets[:, 1:], threshold) for threshold in thresholds]
    assert report.f1_at(probs[:, 1], targets[:, 1], thresholds) == pytest.approx(expected)


def test_label_pairs_against_counting(monkeypatch):
    monkeypatch.setattr(report, "BLOCK", 2)
    targets, probs = random_set(80, 7)
    given, names = metric.decode(probs), list("abcdefg")
    page = Page(render(targets, probs, names))
    missed, extra = targets & ~given, given & ~targets
    expected = {
        (names[a], names[b], str((missed[:, a] & extra[:, b]).sum()))
        for a in range(7)
        for b in range(7)
    }
    shown = page.tables["confused"][1]
    assert {tuple(row) for row in shown} == {row for row in expected if row[2] != "0"}
    counts = [int(row[2]) for row in shown]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    expected = set()
    for a in range(7):
        for b in range(a + 1, 7):
            rows = given[targets[:, a] & targets[:, b]][:, [a, b]].sum(axis=1)
            counts = (len(rows), *(int((rows == n).sum()) for n in (2, 1, 0)))
            expected.add((names[a], names[b], *map(str, counts)))
    assert {tuple(row) for row in page.tables["pairs"][1]} == {r for r in expected if r[2] != "0"}


def test_worst_cases_come_first(monkeypatch):
    monkeypatch.setattr(report, "CASES", 5)
    targets, probs = random_set(40, 4)
    thresholds = [0.2, 0.5, 0.6, 0.3]
    page = Page(render(targets, probs, list("abcd"), thresholds=thresholds))
    margins = np.where(targets, thresholds - probs, probs - np.float32(thresholds))
    worst = np.argsort(-margins.max(axis=1), kind="stable")[:5]
    assert [int(re.match(r"文(\d+)Gold", a)[1]) for a in page.articles] == worst.tolist()
    first = int(margins[worst[0]].argmax())
    wrong = "missed" if targets[worst[0], first] else "wrongly given"
    probability = f"probability {probs[worst[0], first]:.3f}, threshold {thresholds[first]:.3f}"
    assert f"{wrong}: {'abcd'[first]}, {probability}" in page.articles[0]


def test_nothing_wrong_and_nothing_gold():
    perfect = np.eye(3, dtype=bool)
    page = Page(render(perfect, perfect.astype(np.float32), list("abc")))
    assert page.articles == [] and page.tables["confused"][1] == page.tables["pairs"][1] == []
    nothing = Page(render(perfect & False, perfect.astype(np.float32) / 9, list("abc")))
    assert nothing.figures == [] and nothing.column("labels", "average_precision") == ["–"] * 3


def test_long_texts_are_shortened():
    targets, probs = random_set(3, 2)
    html = render(targets, 1 - targets.astype(np.float32), list("ab"), texts=["文" * 400_000] * 3)
    assert len(html) < 50_000 and f"{'文' * 2000} …<" in html
    for language, note in (
        ("zh", "（共 400000 个字符）真实："),
        ("en", " (400000 characters)Gold: "),
    ):
        article = Page(html, language).articles[0]
        assert article.startswith(f"{'文' * 2000} …{note}")


# ------------------------------------------------------------------------------------ the document
def test_hostile_labels_and_texts():
    targets, probs = random_set(30, 4)
    html = render(targets, probs, HOSTILE, texts=[HOSTILE_TEXT] * 30)
    page = Page(html)  # fails on tags that do not match
    assert page.column("labels", "label") == HOSTILE
    assert page.articles and all(a.startswith(HOSTILE_TEXT + "Gold") for a in page.articles)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_needs_nothing_from_elsewhere():
    page = Page(html := render(*random_set(30, 4), list("abcd")))
    links = [value for name, value in page.attributes if name in ("href", "src")]
    assert links == [f"#{key}" for key in re.findall(r'<section id="(\w+)">', html)]
    assert len(links) == 7 and "{{" not in html
    assert "://" not in html and "url(" not in html and "@import" not in html
    names = [value for name, value in page.attributes if name == "data-sort"]
    assert len(names) == len(set(names)) > 20


def test_many_labels():
    rng = np.random.default_rng(2)
    probs = (rng.random((1500, 2000)) ** 8).astype(np.float32)
    targets = (probs > 0.6) ^ (rng.random(probs.shape) < 0.002)
    start = time.process_time()
    html = render(targets, probs, [f"标签{i}" for i in range(2000)])
    assert time.process_time() - start < 60 and len(html) < 2_500_000
    page = Page(html)
    assert len(page.tables["labels"][1]) == len(page.tables["thresholds"][1]) == 2000
    assert len(page.figures) == report.CURVES and len(page.articles) == report.CASES
    assert len(page.tables["confused"][1]) == len(page.tables["pairs"][1]) == report.PAIRS


# --------------------------------------------------------------------------------------- a browser
@pytest.fixture(scope="session")
def chromium():
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    if path := next(found, None):
        return path
    if os.environ.get("REQUIRE_SHARED"):
        pytest.fail("REQUIRE_SHARED is set and no Chromium is installed")
    pytest.skip("no Chromium is installed; the page is not tested in a browser")


@pytest.fixture
def browse(chromium, tmp_path):
    """browse(html, hash, *flags) opens the page; returns (stdout, lines of its console)."""

    def browse(html, fragment, *flags):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *flags]
        command.append(f"file://{tmp_path / 'page.html'}{fragment}")
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]

    return browse


def test_sorting_in_a_browser(browse):
    targets, probs = random_set(60, 12)
    labels = [*HOSTILE, *(f"标签{i}" for i in range(8))]
    html = render(targets, probs, labels)
    before = Page(html)
    for key, sign in (("f1", ""), ("average_precision", "-")):
        dom, console = browse(html, f"#sort={sign}{key}", "--dump-dom")
        after, last = Page(dom), -np.inf if sign else np.inf
        values = [last if v == "–" else float(v) for v in before.column("labels", key)]
        order = sorted(range(12), key=lambda i: -values[i] if sign else values[i])
        rows = before.tables["labels"][1]
        assert after.tables["labels"][1] == [rows[i] for i in order] != rows
        state = "descending" if sign else "ascending"
        assert [v for name, v in after.attributes if name == "aria-sort"] == [state]
        assert after.tables["thresholds"] == before.tables["thresholds"]
        assert console == []
    # A click does what the address does, and a second one turns the order around.
    button = "document.querySelector('[data-sort=support]')"
    again = f"addEventListener('hashchange', () => {button}.click(), {{once: true}});"
    script = f"<script>{button}.click(); {again}</script></body>"
    html = re.sub('<meta http-equiv="Content-Sec[^>]*>', "", html).replace("</body>", script)
    dom, console = browse(html, "", "--dump-dom", "--virtual-time-budget=2000")
    support = [int(v) for v in Page(dom).column("labels", "support")]
    assert support == sorted(support, reverse=True) and console == []
    assert ("aria-sort", "descending") in Page(dom).attributes


def test_foreign_scripts_do_not_run(browse):
    html = render(*random_set(20, 4), list("abcd"))
    html = html.replace("<nav>", "<script>document.title = 'bad'</script><nav>")
    dom, console = browse(html, "", "--dump-dom")
    assert "<title>评估报告</title>" in dom
    assert len(console) == 1 and "Content Security Policy" in console[0]


def test_screenshot(browse, tmp_path):
    html = render(*random_set(60, 12), [f"标签{i}" for i in range(12)])
    picture = tmp_path / "page.png"
    browse(html, "", f"--screenshot={picture}", "--window-size=1200,1700")
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (1200, 1700))
        colours = dict((colour[:3], n) for n, colour in image.getcolors(1 << 24))
    assert colours[(255, 255, 255)] > 1e6 and len(colours) > 100
    for drawn in ((0x25, 0x63, 0xEB), (0xC2, 0x41, 0x0C), (0x15, 0x80, 0x3D)):
        assert colours.get(drawn, 0) > 100  # a curve, the threshold's point, the best one's
