"""evaluate.py --compare: what changes between models, its intervals, its files, and its page."""

import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import compare
import differences
import evaluate
import numpy as np
import pytest
import report
import test_report
from browser import Browser
from predictor import Predictor
from scipy import sparse
from sklearn.metrics import f1_score
from test_report import HOSTILE, HOSTILE_TEXT, Page

import metric
import model as models
import utils

chromium = test_report.chromium
CHANGES = "gained", "lost", "right"  # of a label
# One hand-made case: gold labels and the decisions of two models, a row per text.
GOLD = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
FIRST = [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
SECOND = [[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]]


def csr(rows):
    return sparse.csr_matrix(np.asarray(rows, dtype=np.int32))


def random_case(texts=40, classes=6, seed=5):
    """(gold, decisions of three models): the second is close to gold, the third less so."""
    rng = np.random.default_rng(seed)
    gold = rng.random((texts, classes)) < 0.3
    gold[:, 0] = False  # a label that no text has
    return gold, [gold ^ (rng.random(gold.shape) < rate) for rate in (0.2, 0.05, 0.35)]


# ---------------------------------------------------------------------------------------- figures
def test_exact_figures():
    result = differences.figures(list("abc"), csr(GOLD), [csr(FIRST), csr(SECOND)])
    first, second = result["models"]
    # Of the first model: a 2 of 2; b 0 of 2; c one too many. Of the second: a 1 right, 1 wrong, 1
    # missed; b 2 of 2.
    assert (first["micro"]["f1"], second["micro"]["f1"]) == pytest.approx((4 / 7, 6 / 8))
    assert (first["macro"]["f1"], second["macro"]["f1"]) == pytest.approx((1 / 3, (1 / 2 + 1) / 3))
    assert (first["subset_accuracy"], second["subset_accuracy"]) == (1 / 4, 2 / 4)
    found = second["difference"]
    assert found["micro"]["f1"] == pytest.approx(6 / 8 - 4 / 7)
    assert found["macro"]["f1"] == pytest.approx(1 / 2 - 1 / 3)
    assert "difference" not in first
    assert second["texts"] == {"changed": 3, "better": 1, "worse": 0}
    assert result["classes"] == [
        {"label": "b", "support": 2, "f1": [0, 1], "gained": [0, 2], "lost": [0, 0],
         "right": [0, 2]},
        {"label": "a", "support": 2, "f1": [1, 0.5], "gained": [0, 1], "lost": [0, 1],
         "right": [0, 0]},
        {"label": "c", "support": 0, "f1": [0, 0], "gained": [0, 0], "lost": [0, 1],
         "right": [0, 1]},
    ]  # fmt: skip
    # The second and the fourth text have one wrong label before and after, the third got better.
    assert differences.changed_texts(csr(GOLD), [csr(FIRST), csr(SECOND)]) == [1, 3, 2]


def test_intervals_against_scikit_learn(monkeypatch):
    """The same resamples, one after the other, by repeating rows."""
    monkeypatch.setattr(differences, "CELLS", 7 * 42)  # several blocks
    gold, given = random_case()
    sampled = differences.bootstrap(csr(gold), list(map(csr, given)), 60, seed=8)
    assert sampled.shape == (2, 3, 60)
    drawn = np.concatenate(list(differences.resamples(40, 60, 8, 60)))
    for k, weights in enumerate(drawn):
        rows = np.repeat(np.arange(40), weights)
        for i, one in enumerate(given):
            expected = [
                f1_score(gold[rows], one[rows], average=average, zero_division=0)
                for average in ("micro", "macro")
            ]
            assert sampled[:, i, k] == pytest.approx(expected, abs=1e-12)
    result = differences.figures(list("abcdef"), csr(gold), list(map(csr, given)), 60, 8)
    for a, average in enumerate(("micro", "macro")):
        for i, one in enumerate(result["models"]):
            bounds = np.percentile(sampled[a, i], [2.5, 97.5])
            assert one[average]["f1_interval"] == pytest.approx(bounds)
            if i:
                found = one["difference"][average]
                bounds = np.percentile(sampled[a, i] - sampled[a, 0], [2.5, 97.5])
                assert found["f1_interval"] == pytest.approx(bounds)
                assert found["verdict"] == ("better", "worse")[i - 1]


def test_resamples():
    drawn = np.concatenate(list(differences.resamples(50, 400, 3, 64)))
    assert drawn.shape == (400, 50) and (drawn.sum(axis=1) == 50).all()
    # Each text is drawn once on average, with the variance of the binomial distribution.
    assert drawn.mean(axis=0) == pytest.approx(np.ones(50), abs=0.25)
    assert drawn.var() == pytest.approx(1 - 1 / 50, abs=0.05)
    again, other = (np.concatenate(list(differences.resamples(50, 400, s, 7))) for s in (3, 4))
    assert (again == drawn).all() and (other != drawn).any()


def test_identical_models_change_nothing():
    gold, (one, *_) = random_case()
    result = differences.figures(list("abcdef"), csr(gold), [csr(one), csr(one)])
    a, b = result["models"]
    assert a["micro"] == b["micro"] and a["macro"] == b["macro"]
    for found in b["difference"].values():
        assert found == {"f1": 0, "f1_interval": [0, 0], "verdict": "same"}
    assert b["texts"] == {"changed": 0, "better": 0, "worse": 0}
    assert all(not any(row["gained"] + row["lost"]) for row in result["classes"])
    assert differences.changed_texts(csr(gold), [csr(one), csr(one)]) == []


def test_many_texts_and_labels():
    rng = np.random.default_rng(2)
    gold, first, second = (
        sparse.random(20_000, 2000, 0.001, "csr", np.int32, rng, np.ones) for _ in range(3)
    )
    start = time.process_time()
    result = differences.figures([str(i) for i in range(2000)], gold, [first, second], 200)
    assert time.process_time() - start < 30 and len(result["classes"]) == 2000


class Fake:
    """A labeller that takes a second for so many texts."""

    batch_size = 1

    def __init__(self, name, clock, speed):
        self.name, self.clock, self.speed = name, clock, speed

    def decide(self, texts):
        self.clock.now += len(texts) / self.speed
        self.clock.calls.append((self.name, texts))


def test_models_take_turns(monkeypatch):
    """On the same parts, in alternating order; of many texts some are enough."""
    monkeypatch.setattr(compare, "TIMED", 22)
    for number, parts in ((13, 4), (64, 6)):
        clock = SimpleNamespace(now=0.0, calls=[])
        monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        texts = list(map(str, range(number)))
        fakes = [Fake("A", clock, 4), Fake("B", clock, 2)]
        seconds, timed = compare.time_in_turns(fakes, texts)
        assert timed == min(number, 22) and seconds.shape == (parts, 2)
        assert "".join(name for name, _ in clock.calls) == ("ABBA" * parts)[: 2 * parts]
        used = [sum((part for n, part in clock.calls if n == name), []) for name in "AB"]
        assert used[0] == used[1] == (texts if number < 22 else texts[::3])
        sizes = [len(part) for name, part in clock.calls if name == "A"]
        assert seconds.tolist() == [[n / 4, n / 2] for n in sizes] and max(sizes) - min(sizes) <= 1
    one = SimpleNamespace(name="B", spec="b", engine="", files=list)
    one.info = SimpleNamespace(max_seq_length=8)
    cost = compare.cost(one, seconds, 1, timed)
    assert cost["texts_per_second"] == 2 and cost["speed_ratio"] == 0.5
    assert cost["speed_ratio_of_parts"] == [0.5, 0.5]


# ------------------------------------------------------------------------------------ real models
def test_names_of_models(tmp_path, monkeypatch):
    """A width of prune.py is a checkpoint and a bundle in one folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.5").mkdir()
    for name in ("config.json", "model_state.pdparams", "float32.pdiparams"):
        (tmp_path / "0.5" / name).touch()
    for spec, device, expected in (
        ("0.5", "xpu", ("0.5", None)),
        ("0.5/float32", "cpu", ("0.5/float32", "fp32")),
        ("./0.5/float32:int8", "cpu", ("./0.5/float32", "int8")),
        ("0.5/float32:fp16", "gpu:1", ("0.5/float32", "fp16")),
    ):
        assert compare.split_spec(spec, device) == expected


@pytest.fixture(scope="module")
def reordered(checkpoint, tmp_path_factory):
    """The checkpoint with its labels in reverse order, thresholds of its own and a short length,
    in a folder whose name is not UTF-8."""
    labels = utils.read_model_info(checkpoint).labels[::-1]
    net, _ = models.load_checkpoint(checkpoint, labels)
    net.config.id2label = dict(enumerate(labels))
    folder = tmp_path_factory.mktemp("reordered") / os.fsdecode("模型".encode("gbk"))
    models.save_checkpoint(folder, net, checkpoint)
    config = utils.read_json(folder / "config.json")
    config |= {"thresholds": np.linspace(0.1, 0.9, 20).tolist(), "max_seq_length": 40}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def run(small_data, tmp_path, run_cli):
    """run(*models, more flags...) returns (exit status, messages of the log, all of stderr)."""

    def run(*specs, flags=(), dataset_dir=small_data):
        argv = ["--device", "cpu", "--dataset_dir", dataset_dir, "--compare", *specs]
        argv += ["--changed_path", tmp_path / "changed.txt", "--resamples", "200", *flags]
        status, error = run_cli(evaluate.main, argv)
        messages = re.findall(r"^\[\d{4}-\d\d-\d\d [\d:,]+\] \[ +INFO\] - (.*)$", error, re.M)
        return status, messages, error

    return run


def decided(folder, texts):
    """The label names that a checkpoint gives, in another way than evaluate.py's."""
    labeller = models.load_labeller(folder, "cpu")
    probs = metric.probabilities(labeller.logits(texts))
    decisions = metric.decode(probs, labeller.info.thresholds)
    return [set(names) for names in metric.label_names(decisions, labeller.info.labels)], labeller


def test_each_model_decides_by_its_own_rule(run, checkpoint, reordered, small_data, tmp_path):
    pages = ["--json_path", tmp_path / "r.json", "--report_path", tmp_path / "r.html"]
    status, messages, error = run(checkpoint, reordered, flags=pages)
    assert status == 0
    assert " has tuned thresholds: figures on the set they come from" in error
    labels = utils.read_labels(small_data / "label.txt")
    texts, gold = utils.read_examples(small_data / "dev.txt", labels)
    names = [{labels[i] for i in ids} for ids in gold]
    (first, _), (second, short) = (decided(folder, texts) for folder in (checkpoint, reordered))
    assert short.info.max_seq_length == 40 and short.info.labels == labels[::-1]
    # The file: exactly the texts on which they differ, in the order of dev.txt.
    heads, *rows = (tmp_path / "changed.txt").read_text("utf-8").splitlines()
    assert heads == f"Label\t{checkpoint}\t{utils.printable(str(reordered))}\tText"
    changed = [i for i in range(len(texts)) if first[i] != second[i]]
    assert 3 < len(changed) < len(texts)
    assert [row.split("\t")[3] for row in rows] == [texts[i] for i in changed]
    for row, i in zip(rows, changed):
        found = [set(filter(None, cell.split(","))) for cell in row.split("\t")[:3]]
        assert found == [names[i], first[i], second[i]]
    # The figures are scikit-learn's, the bytes those of the files.
    result = json.loads((tmp_path / "r.json").read_text("utf-8"))
    rows = (names, first, second)
    hot = np.array([[[label in row for label in labels] for row in some] for some in rows])
    used = ("config.json", "model_state.pdparams", "vocab.txt", "tokenizer_config.json")
    for i, (found, folder) in enumerate(zip(result["models"], (checkpoint, reordered))):
        for average in ("micro", "macro"):
            expected = f1_score(hot[0], hot[1 + i], average=average, zero_division=0)
            assert found[average]["f1"] == pytest.approx(expected)
            low, high = found[average]["f1_interval"]
            assert 0 < low < high <= 1
        assert found["bytes"] == sum((folder / name).stat().st_size for name in used)
        assert found["texts_per_second"] > 0
    wrong = [[len(a ^ b) for a, b in zip(names, given)] for given in (first, second)]
    texts_changed = {
        "changed": len(changed),
        "better": sum(b < a for a, b in zip(*wrong)),
        "worse": sum(b > a for a, b in zip(*wrong)),
    }
    assert result["models"][1]["texts"] == texts_changed
    # Log and page say the same.
    macro = result["models"][1]["macro"]
    low, high = macro["f1_interval"]
    figure = f"{100 * macro['f1']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    assert any(m.startswith("B: micro F1 ") and f"macro F1 {figure}" in m for m in messages)
    page = Page(html := (tmp_path / "r.html").read_text("utf-8"))
    assert page.column("models", "models_macro_f1")[1] == figure
    assert len(page.articles) == len(changed) and html.count("<h2") == len(compare.SECTIONS)
    rows = [row for row in result["classes"] if any(row["gained"] + row["lost"])]
    assert page.column("labels", "label") == [row["label"] for row in rows]
    for key in CHANGES:
        assert page.column("labels", f"{key}_b") == [str(row[key][1]) for row in rows]
    moves = [abs(row["f1"][1] - row["f1"][0]) for row in rows]
    assert moves == sorted(moves, reverse=True) and moves[0] > 0


def test_a_checkpoint_its_bundle_and_int8(run, checkpoint, bundle, small_data, tmp_path):
    """The bundle labels as the checkpoint does; int8 is made on the way and is smaller."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    prefix = folder / "float32"
    specs = checkpoint, prefix, f"{prefix}:int8", f"{prefix}:fp32"
    status, messages, _ = run(*specs, flags=["--json_path", tmp_path / "r.json"])
    assert status == 0
    result = json.loads((tmp_path / "r.json").read_text("utf-8"))
    found = result["models"]
    engines = ["Paddle", "ONNX Runtime fp32", "ONNX Runtime int8", "ONNX Runtime fp32"]
    assert [one["engine"] for one in found] == engines
    assert [one["model"] for one in found] == list(map(str, specs))
    for i in (1, 3):
        assert found[i]["texts"] == {"changed": 0, "better": 0, "worse": 0}
        assert found[i]["difference"]["micro"]["verdict"] == "same"
    others = sum((folder / n).stat().st_size for n in ("config.json", "vocab.txt"))
    others += (folder / "tokenizer_config.json").stat().st_size
    assert found[1]["bytes"] == others + (folder / "model.onnx").stat().st_size
    assert found[2]["bytes"] == others + (folder / "int8_model.onnx").stat().st_size
    assert found[2]["bytes"] < found[1]["bytes"] / 2
    # What int8 gives is what infer.py gives.
    labels = utils.read_labels(small_data / "label.txt")
    texts, _ = utils.read_examples(small_data / "dev.txt", labels)
    names, _ = Predictor(str(prefix), precision="int8").predict(texts)
    rows = [row.split("\t") for row in (tmp_path / "changed.txt").read_text("utf-8").splitlines()]
    assert len(rows) == 1 + max(one["texts"]["changed"] for one in found[1:])
    for *_, int8, _, text in rows[1:]:
        assert int8 == ",".join(names[texts.index(text)])
    assert f"C: {prefix}:int8 (ONNX Runtime int8, max_seq_length 128)" in messages
    assert "Dev dataset size: 40" in messages
    (speed,) = (message for message in messages if message.startswith("Speed: "))
    assert speed.startswith("Speed: one run on 40 texts, in turns (parts: 1), on ")
    assert speed.endswith(f"{compare.device_name('cpu')}, cores: {utils.num_cores()}")


# ----------------------------------------------------------------------------------------- errors
FAULTS = {
    "one model": (["model"], [], "--compare takes 2 to 26 models, not 1"),
    "nothing there": (
        ["model", "none"],
        [],
        "--compare none: neither a checkpoint folder nor a bundle's prefix is there",
    ),
    "a bundle's folder": (
        ["model", "bundle"],
        [],
        "--compare bundle: a bundle's folder; give the prefix of its files, bundle/float32",
    ),
    "another prefix": (
        ["model", "bundle/float23"],
        [],
        "--compare bundle/float23: no such bundle; there is bundle/float32",
    ),
    "precision of a checkpoint": (
        ["model", "model:int8"],
        [],
        "--compare model:int8: a checkpoint has no precision; run export_model.py on it",
    ),
    "half precision on the CPU": (
        ["model", "bundle/float32:fp16"],
        [],
        "--compare bundle/float32:fp16: fp16 needs --device gpu; on the CPU use int8",
    ),
    "int8 on the GPU": (
        ["model", "bundle/float32:int8"],
        ["--device", "gpu:1"],
        "--compare bundle/float32:int8: int8 needs --device cpu; on the GPU use fp16",
    ),
    "a bundle elsewhere": (
        ["model", "bundle/float32"],
        ["--device", "xpu"],
        "--compare bundle/float32: a bundle runs on cpu, gpu or gpu:0, not on --device xpu",
    ),
    "other labels": (
        ["model", "other"],
        [],
        "--compare other: other labels than those of model: it lacks '婚后有子女', "
        "'有夫妻共同财产'; it also has 'x'; compare models of the same labels",
    ),
    "too long": (["model", "model"], ["--max_seq_length", "600"], "this model takes 3 to 160"),
    "another mode": (
        ["model", "model"],
        ["--params_path", "model"],
        "--compare takes no --params_path; leave it out",
    ),
    "tuning": (
        ["model", "model"],
        ["--tune_thresholds"],
        "--compare takes no --tune_thresholds; leave it out",
    ),
    "over an ONNX file": (
        ["model", "bundle/float32"],
        ["--report_path", "bundle/model.onnx"],
        "bundle/model.onnx: it is an input",
    ),
    "over a static graph": (
        ["model", "bundle/float32"],
        ["--json_path", "bundle/float32.pdiparams"],
        "bundle/float32.pdiparams: it is an input",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors(run, tiny_model, tmp_path, monkeypatch, small_data, fault):
    """They come before any model is loaded, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    labels = utils.read_labels(small_data / "label.txt")
    config = utils.read_json(tiny_model / "config.json") | {"max_seq_length": 128}
    names = {"model": labels, "bundle": labels, "other": [*labels[3:], labels[1], "x"]}
    for name, given in names.items():
        (tmp_path / name).mkdir()
        config["id2label"] = dict(enumerate(given))
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("model/model_state.pdparams", "other/model_state.pdparams"):
        (tmp_path / file).touch()
    for file in ("float32.pdiparams", "model.onnx"):
        (tmp_path / "bundle" / file).touch()
    specs, flags, message = FAULTS[fault]
    before = sorted(os.walk(tmp_path))
    status, _, error = run(*specs, flags=flags)
    assert status == 2 and "Traceback" not in error
    assert message in error[error.index("error: ") :].splitlines()[0]
    assert sorted(os.walk(tmp_path)) == before


def test_flags_of_the_comparison_need_it(run_cli, small_data):
    flags = ["--dataset_dir", small_data, "--changed_path", "c.txt"]
    status, error = run_cli(evaluate.main, flags)
    assert status == 2 and error.splitlines()[-1] == "error: --changed_path needs --compare"


# -------------------------------------------------------------------------------------- the pages
def comparison_page(labels=(*HOSTILE, "乙", "丙"), text=HOSTILE_TEXT):
    gold, given = random_case()
    gold[0], given[0][0], given[1][0] = True, True, False  # the second model loses this text
    names, label_ids = list(labels), [np.flatnonzero(row).tolist() for row in gold]
    given = list(map(csr, given))
    result = differences.figures(names, csr(gold), given, 100)
    info = utils.ModelInfo(names, 128, 512, None)
    specs = ["checkpoint", "prune/0.5", f"export/{HOSTILE[0]}:int8"]
    letters = zip("ABC", specs)
    compared = [compare.Model(n, s, s, None, info) for n, s in letters]
    seconds = np.array([[2.0, 1.0, 0.5], [2.0, 1.0, 0.4]])
    result |= {
        "dev": "dev.txt", "samples": 40, "device": "A processor", "cores": 1,
        "timed": {"texts": 40, "parts": 2},
        "bootstrap": {"percent": 95, "resamples": 100, "seed": 3},
        "models": [
            {**compare.cost(one, seconds, i, 40), "bytes": 4_000_000 >> i, **found}
            for i, (one, found) in enumerate(zip(compared, result["models"]))
        ],
    }  # fmt: skip
    texts = [f"{text}{i}" for i in range(40)]
    changed = differences.changed_texts(csr(gold), given)
    return compare.render(compared, result, names, texts, label_ids, given, changed), result


def test_page_of_the_comparison():
    html, result = comparison_page()
    page = Page(html)  # fails on tags that do not match
    assert page.column("models", "models_model") == ["A", "B", "C"]
    assert page.column("models", "models_texts_per_second") == ["10.0", "20.0", "44.4"]
    ratios = ["1.00 [1.00, 1.00]", "2.00 [2.00, 2.00]", "4.44 [4.00, 5.00]"]
    assert page.column("models", "models_speed_a") == ratios
    assert page.column("models", "models_size_mb") == ["4.00", "2.00", "1.00"]
    assert set(page.column("labels", "label")) == {*HOSTILE, "乙", "丙"}
    for i, letter in enumerate("bc", 1):
        changes = [
            [f"{100 * (r['f1'][i] - r['f1'][0]):+.2f}", *(str(r[k][i]) for k in CHANGES)]
            if r["gained"][i] + r["lost"][i] else [""] * 4
            for r in result["classes"]
        ]  # fmt: skip
        shown = [page.column("labels", f"{key}_{letter}") for key in ("change", *CHANGES)]
        assert list(map(list, zip(*shown))) == changes
    # What got worst comes first: the first text, where the second model missed every label.
    assert page.articles[0].startswith(f"{HOSTILE_TEXT}0Gold: ")
    assert page.articles[0].count("missed ") >= 6
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "://" not in html and "url(" not in html and "{%" not in html
    sorts = [value for name, value in page.attributes if name == "data-sort"]
    assert len(sorts) == len(set(sorts)) == 7 + 3 + 5 * 2


def test_nothing_changed():
    """A page without tables of changes, and no division by a width of zero."""
    gold, (one, *_) = random_case()
    given = [csr(one), csr(one)]
    labels = list("abcdef")
    info = utils.ModelInfo(labels, 128, 512, None)
    compared = [compare.Model(name, name, name, None, info) for name in "AB"]
    result = differences.figures(labels, csr(gold), given, 10)
    costs = [compare.cost(m, np.ones((1, 2)), i, 40) | {"bytes": 8} for i, m in enumerate(compared)]
    result["models"] = [{**a, **b} for a, b in zip(costs, result["models"])]
    result |= {"dev": "d", "samples": 40, "device": "p", "cores": 2}
    result["timed"] = {"texts": 40, "parts": 1}
    result["bootstrap"] = {"percent": 95, "resamples": 10, "seed": 3}
    html = compare.render(compared, result, labels, [""] * 40, [[]] * 40, given, [])
    page = Page(html)
    assert page.tables["labels"][1] == [] and page.articles == []
    assert html.count("the same labels") == 2 and "nan" not in html


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    with Browser(chromium, tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture(params=["comparison", "evaluation"])
def page(request, browser, tmp_path):
    """(browser, address) of a page; what it brings into the browser's console is an error."""
    if request.param == "comparison":
        html, _ = comparison_page()
    else:
        labels = [*HOSTILE, "乙", "丙"]
        html = test_report.render(*test_report.random_set(60, 6), labels, [HOSTILE_TEXT] * 60)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    browser.console.clear()
    browser.resize(1200, 900)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(address := (tmp_path / "page.html").as_uri())
    yield browser, address, Page(html, "zh"), Page(html, "en")
    assert browser.console == []


TITLES = {"模型对比": "Model comparison", "评估报告": "Evaluation report"}
CHINESE = re.compile("[\u4e00-\u9fff]")


def shown(browser):
    """(title, language, heads of the tables, headings): what a reader sees."""
    title = browser.evaluate("[document.title, document.documentElement.lang]")
    return *title, browser.texts("th button"), browser.texts("h2")


def test_languages(page):
    """Chinese first; the button and the address switch, and sorting keeps the language."""
    browser, address, _, _ = page
    title, language, heads, headings = shown(browser)
    assert language == "zh-CN" and browser.text("h1") == title in TITLES
    assert browser.text("#language") == "English" and CHINESE.search("".join(headings))
    assert "Texts" not in browser.text("body") and "文本" in browser.text("body")
    browser.click("#language")
    browser.wait("document.documentElement.lang === 'en'")
    english = shown(browser)
    assert english[0] == browser.text("h1") == TITLES[title]
    assert not CHINESE.search("".join(english[2] + english[3]) + browser.text("p"))
    assert len(english[2]) == len(heads) and browser.text("#language") == "中文"
    browser.click("th button[data-sort=label]")
    browser.wait("document.querySelectorAll('th[aria-sort]').length === 1")
    assert browser.evaluate("location.hash") == "#lang=en&sort=label"
    assert shown(browser) == english
    browser.click("nav a")  # leads to a section and leaves the language as it is
    browser.wait("!location.hash.includes('lang')")
    assert shown(browser) == english
    browser.click("#language")
    browser.wait("document.documentElement.lang === 'zh-CN'")
    assert shown(browser) == (title, language, heads, headings)
    browser.open("about:blank")
    browser.open(f"{address}#sort=-label&lang=en")
    assert shown(browser) == english
    assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == "descending"


def test_without_scripts(page):
    browser, address, *_ = page
    before = shown(browser)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open("about:blank")
    browser.call("Page.navigate", url=address)
    browser.wait("location.protocol === 'file:' && document.readyState === 'complete'")
    assert shown(browser) == before
    assert not browser.evaluate("document.querySelector('#language').checkVisibility()")
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_labels_and_texts_are_shown(page):
    browser, _, parsed, _ = page
    assert browser.texts("blockquote")[0].startswith(HOSTILE_TEXT)
    cells = browser.texts("[data-table=labels] td:not(.n)")
    assert cells == parsed.column("labels", "label") and set(HOSTILE) <= set(cells)
    assert browser.evaluate("document.querySelectorAll('img, script').length") == 1


@pytest.mark.parametrize("language", ["zh", "en"])
def test_on_a_phone(page, language):
    """Nothing but the tables, which scroll, is wider than the screen."""
    browser, address, *_ = page
    browser.resize(360, 700)
    browser.open("about:blank")
    browser.open(f"{address}#lang={language}")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    wide = "[...document.querySelectorAll('body *')].filter((e) => !e.closest('table') && "
    wide += "e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 80))"
    assert browser.evaluate(wide) == []
    # The label stays beside its figures when the table is scrolled to the right.
    scroll = "document.querySelector('[data-table=labels]')"
    browser.evaluate(f"{scroll}.scrollLeft = 10000")
    place = f"{scroll}.querySelector('td:not(.n)').getBoundingClientRect().left"
    left = browser.evaluate(f"[{place}, {scroll}.getBoundingClientRect().left]")
    assert left[0] == pytest.approx(left[1], abs=2)
    assert browser.evaluate(f"{scroll}.scrollLeft") > 50


def test_intervals_are_drawn_to_scale(browser, tmp_path):
    html, result = comparison_page()
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    browser.resize(1200, 900)
    browser.open((tmp_path / "page.html").as_uri())
    lines = browser.evaluate(
        "[...document.querySelectorAll('.answers svg')].map((svg) => ['.axis', '.range', '.now']"
        ".map((part) => { const box = svg.querySelector(part).getBBox();"
        " return [box.x, box.x + box.width]; }))"
    )
    found = [list(one["difference"].values()) for one in result["models"][1:]]
    # A card has one scale: the farthest end of its two intervals is at the edge.
    edges = [max(abs(bound) for f in pair for bound in f["f1_interval"]) for pair in found]
    assert len(lines) == 4 and edges[0] != edges[1]
    for (axis, drawn, point), f, edge in zip(lines, sum(found, []), np.repeat(edges, 2)):
        assert axis == [-100, 100]
        assert drawn == pytest.approx([100 * b / edge for b in f["f1_interval"]], abs=0.06)
        assert point[0] == pytest.approx(100 * f["f1"] / edge, abs=0.06)


def test_every_phrase_has_both_languages():
    """With the same figures in it."""
    for name in ("comparison", "evaluation", "macros", "frame"):
        source = (report.PAGES / f"{name}.html").read_text("utf-8")
        for chinese, english in re.findall(r'\bt\("([^"]*)",\s*"([^"]*)"', source):
            assert CHINESE.search(chinese) or chinese in "：", chinese
            assert english and not CHINESE.search(english), english
            fields = [sorted(re.findall(r"{(\w+)}", half)) for half in (chinese, english)]
            assert fields[0] == fields[1], chinese
