"""analysis/evaluate.py: its log, its files and its thresholds, against scikit-learn."""

import json
import os
import re
import shutil

import evaluate
import numpy as np
import paddle
import pytest
from conftest import SAMPLE
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

import metric
import model as models
import predict
import utils

LABELS = utils.read_labels(SAMPLE / "label.txt")
KEYS = ("precision", "recall", "f1", "support")


@pytest.fixture(scope="module")
def data(small_data, tmp_path_factory):
    """small_data with dev labels in reverse order, and in two samples such that no model gives."""
    folder = tmp_path_factory.mktemp("evaluate") / "data"
    shutil.copytree(small_data, folder)
    samples = [line.split("\t") for line in (folder / "dev.txt").read_text("utf-8").splitlines()]
    lines = [f"{text}\t{','.join(names.split(',')[::-1])}\n" for text, names in samples]
    lines[3] = lines[3].split("\t")[0] + "\t" + ",".join(LABELS[::-1]) + "\n"
    lines[5] = lines[5].split("\t")[0] + f"\t {LABELS[19]} , {LABELS[14]}\n"
    lines.insert(7, "本院依法公开开庭进行了审理。\t\n")
    (folder / "dev.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def probabilities(checkpoint, texts):
    return metric.probabilities(models.load_labeller(checkpoint, "cpu").logits(texts))


@pytest.fixture(scope="module")
def truth(checkpoint, data):
    """{file: (texts, targets, decisions)} by another way than evaluate.py's running counts."""
    result = {}
    for name in ("train", "dev"):
        texts, label_ids = utils.read_examples(data / f"{name}.txt", LABELS)
        decisions = probabilities(checkpoint, texts) > 0.5
        result[name] = texts, utils.multi_hot(label_ids, 20), decisions
    return result


def figures(targets, decisions, average):
    return precision_recall_fscore_support(targets, decisions, average=average, zero_division=0)


@pytest.fixture
def run(checkpoint, data, tmp_path, run_cli):
    """run(*flags) returns (exit status, messages of the log, all of stderr)."""

    def run(*flags, dataset_dir=data, params_path=checkpoint):
        argv = ["--device", "cpu", "--dataset_dir", dataset_dir, "--params_path", params_path]
        argv += ["--bad_case_path", tmp_path / "bad_case.txt", *flags]
        status, error = run_cli(evaluate.main, argv)
        messages = re.findall(r"^\[\d{4}-\d\d-\d\d [\d:,]+\] \[ +INFO\] - (.*)$", error, re.M)
        return status, messages, error

    return run


def expected_log(truth, names, bad_case_path):
    """The lines of reference.md 7.1 from scikit-learn's figures."""
    sizes = {name: len(truth[name][0]) for name in names}
    _, *dev = truth["dev"]
    lines = ["-----Evaluate model-------"]
    lines += [f"{name.capitalize()} dataset size: {sizes[name]}" for name in names]
    lines.append(f"Accuracy in dev dataset: {100 * accuracy_score(*dev):.2f}%")
    form = "precision: {:.2f} | recall: {:.2f} | F1 score {:.2f}"
    for average in ("micro", "macro"):
        values = [100 * v for v in figures(*dev, average)[:3]]
        lines.append(f"{average.capitalize()} avg in dev dataset: {form.format(*values)}")
    for i, label in enumerate(LABELS):
        lines.append(f"Class name: {label}")
        for name in names:
            *values, support = (v[i] for v in figures(*truth[name][1:], None))
            share = f"{support}({100 * support / sizes[name]:.1f}%)"
            values = form.format(*(100 * v for v in values))
            lines.append(f"Evaluation examples in {name} dataset: {share} | {values}")
        lines.append("----------------------------")
    return [*lines, f"Bad case in dev dataset saved in {bad_case_path}"]


@pytest.mark.parametrize("names", [["train", "dev"], ["dev"]])
def test_log(run, truth, tmp_path, names):
    status, messages, _ = run(
        *(["--skip_train", "--train_file", "none"] if len(names) == 1 else [])
    )
    assert status == 0
    assert messages == expected_log(truth, names, tmp_path / "bad_case.txt")


def test_bad_cases(run, truth, data, tmp_path):
    """Exactly the wrong ones, in the order of dev.txt, with the labels in its order."""
    run("--skip_train")
    lines = (tmp_path / "bad_case.txt").read_bytes().decode().split("\n")
    assert lines[0] == "Prediction\tLabel\tText" and lines[-1] == ""
    expected = []
    for line, row in zip((data / "dev.txt").open(encoding="utf-8"), truth["dev"][2]):
        text, gold = line.rstrip("\n").split("\t")
        gold = [name.strip() for name in gold.split(",") if name]
        predicted = [LABELS[i] for i in np.flatnonzero(row)]
        if set(predicted) != set(gold):
            expected.append("\t".join([",".join(predicted), ",".join(gold), text]))
    assert lines[1:-1] == expected
    assert 2 <= len(expected) < len(truth["dev"][0])


def test_json_report(run, truth, tmp_path):
    status, messages, _ = run("--json_path", tmp_path / "report.json")
    assert status == 0 and messages[-1] == f"Report saved in {tmp_path / 'report.json'}"
    text = (tmp_path / "report.json").read_text("utf-8")
    assert LABELS[0] in text  # readable, not \u escapes
    report = json.loads(text)
    assert list(report) == ["train", "dev"]
    for name, (texts, targets, decisions) in truth.items():
        assert report[name]["samples"] == len(texts)
        assert report[name]["subset_accuracy"] == accuracy_score(targets, decisions)
        for average in ("micro", "macro"):
            expected = dict(zip(KEYS[:3], figures(targets, decisions, average)))
            assert report[name][average] == pytest.approx(expected, rel=1e-15)
        rows = np.transpose(figures(targets, decisions, None)).tolist()
        classes = report[name]["classes"]
        assert [c["label"] for c in classes] == LABELS
        assert [c["predicted"] for c in classes] == decisions.sum(0).tolist()
        for c, row in zip(classes, rows):
            assert [c[key] for key in KEYS] == pytest.approx(row, rel=1e-15)


def test_chunks_change_nothing(run, tmp_path, monkeypatch):
    """With many labels few texts are held at a time; the files are the same."""
    flags = ["--json_path", tmp_path / "r.json", "--report_path", tmp_path / "r.html"]
    results, sizes, encode = [], [], utils.encode

    def watched(texts, *rest):
        sizes.append(len(texts))
        return encode(texts, *rest)

    def rounded(path):
        """Batches of other sizes may change the last digit of a logit."""
        return re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.3f}", path.read_text("utf-8"))

    monkeypatch.setattr(utils, "encode", watched)
    for cells in (utils.CHUNK_CELLS, 20 * 7):
        monkeypatch.setattr(utils, "CHUNK_CELLS", cells)
        assert run("--tune_thresholds", *flags)[0] == 0
        results.append([rounded(p) for p in sorted(tmp_path.iterdir()) if p.is_file()])
    assert results[0] == results[1] and len(results[0]) == 3
    assert sizes == [96, 41, *[7] * 13, 5, *[7] * 5, 6]


# ------------------------------------------------------------------------------------ thresholds
def f1s(decisions, targets):
    return [100 * figures(targets, decisions, average)[2] for average in ("micro", "macro")]


def test_tuned_thresholds(run, checkpoint, tmp_path):
    """Out-of-sample figures are shown; only --save_thresholds changes the checkpoint."""
    texts, label_ids = utils.read_examples(SAMPLE / "dev.txt", LABELS)
    targets, probs = utils.multi_hot(label_ids, 20), probabilities(checkpoint, texts)
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    paths = {"dataset_dir": SAMPLE, "params_path": folder}
    flags = ["--skip_train", "--json_path", tmp_path / "r.json", "--tune_thresholds"]

    def contents():
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    before = contents()
    status, messages, _ = run(*flags, **paths)
    assert status == 0 and contents() == before
    assert "Add --save_thresholds to store them in the checkpoint" in messages
    tuned = json.loads((tmp_path / "r.json").read_text("utf-8"))["tuned"]
    thresholds = list(tuned["thresholds"].values())
    assert list(tuned["thresholds"]) == LABELS and len({round(t, 2) for t in thresholds}) > 3
    figure = r"micro F1 ([\d.]+) -> ([\d.]+) \| macro F1 ([\d.]+) -> ([\d.]+)"
    (shown,) = filter(None, (re.search(figure, message) for message in messages))
    assert "out of sample" in shown.string
    micro, tuned_micro, macro, tuned_macro = map(float, shown.groups())
    assert [micro, macro] == pytest.approx(f1s(probs > 0.5, targets), abs=0.0051)
    out_of_sample = [100 * tuned["out_of_sample"][avg]["f1"] for avg in ("micro", "macro")]
    assert [tuned_micro, tuned_macro] == pytest.approx(out_of_sample, abs=0.0051)
    assert tuned["out_of_sample"]["samples"] == 400
    # On the very data that they were chosen on, thresholds look better than they are.
    in_sample = f1s(metric.decode(probs, thresholds), targets)
    assert in_sample[1] > tuned_macro + 0.1 and in_sample[1] > macro
    for label, threshold in tuned["thresholds"].items():
        assert f"Threshold of {label}: {threshold:.3f}" in messages

    status, messages, _ = run(*flags, "--save_thresholds", **paths)
    assert status == 0 and f"Thresholds stored in {folder}/config.json" in messages
    after = contents()
    config, old = json.loads(after.pop("config.json")), json.loads(before.pop("config.json"))
    assert after == before and {**config, "thresholds": None} == {**old, "thresholds": None}
    assert config["thresholds"] == pytest.approx(thresholds, abs=1e-6)

    # predict.py and evaluate.py itself go by them from now on.
    decisions = metric.decode(probs, thresholds)
    (tmp_path / "data.txt").write_text("\n".join(texts), encoding="utf-8")
    argv = ["--device", "cpu", "--dataset_dir", tmp_path, "--params_path", folder]
    predict.main([str(a) for a in (*argv, "--output_file", tmp_path / "output.txt")])
    _, predicted = utils.read_examples(tmp_path / "output.txt", LABELS)
    assert predicted == [np.flatnonzero(row).tolist() for row in decisions]
    run("--skip_train", "--json_path", tmp_path / "r.json", **paths)
    dev = json.loads((tmp_path / "r.json").read_text("utf-8"))["dev"]
    assert [100 * dev[avg]["f1"] for avg in ("micro", "macro")] == pytest.approx(in_sample)


def test_least_and_most_labels(run, limited, tmp_path):
    """Where the answers of the rule are the gold labels, nothing is wrong but without the rule."""
    checkpoint, _, texts, expected = limited
    (tmp_path / "data").mkdir()
    lines = [f"{text}\t{','.join(names)}\n" for text, names in zip(texts, expected)]
    (tmp_path / "data" / "dev.txt").write_text("".join(lines), encoding="utf-8")
    paths = {"dataset_dir": tmp_path / "data", "params_path": checkpoint}
    flags = ["--skip_train", "--json_path", tmp_path / "r.json"]
    accuracy = []
    for limits in ([], ["--min_labels", 1, "--max_labels", 2]):
        assert run(*flags, *limits, **paths)[0] == 0
        report = json.loads((tmp_path / "r.json").read_text("utf-8"))
        accuracy.append(report["dev"]["subset_accuracy"])
    assert accuracy[0] < 0.99 and accuracy[1] == 1
    run(*flags, "--min_labels", 1, "--max_labels", 1, "--tune_thresholds", **paths)
    tuned = json.loads((tmp_path / "r.json").read_text("utf-8"))["tuned"]["out_of_sample"]
    assert sum(c["predicted"] for c in tuned["classes"]) == tuned["samples"] == len(texts)


def test_stored_thresholds_stay_between_0_and_1(tmp_path):
    config = {"id2label": {"0": "a", "1": "b"}, "max_seq_length": 8, "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    evaluate.save_thresholds(tmp_path, [2e-7, 0.9999997])
    low, high = utils.read_model_info(tmp_path).thresholds
    probs = np.array([[1e-7, 0.9999995], [3e-7, 0.9999999]], dtype=np.float32)
    assert metric.decode(probs, [low, high]).tolist() == [[False, False], [True, True]]


# ---------------------------------------------------------------------------------------- errors
BAD_LINE = "a\t婚后有子女\nb\tx\nc\n"
FAULTS = {
    "target without tune": ({}, ["--tune_for", "both"], "--tune_for needs --tune_thresholds"),
    "save without tune": ({}, ["--save_thresholds"], "--save_thresholds needs --tune_thresholds"),
    "no train file": ({"train.txt": None}, [], "train.txt: No such file"),
    "no dev file": ({"dev.txt": None}, [], "dev.txt: No such file"),
    "empty dev file": ({"dev.txt": ""}, [], "dev.txt: no samples"),
    "bad line": ({"train.txt": BAD_LINE}, [], "train.txt:2: unknown label 'x'"),
    "other labels": ({"label.txt": "a\nb\n"}, [], "label.txt:1: 'a' where the model has"),
    "no checkpoint": ({}, ["--params_path", "none"], "none: no such folder"),
    "too long": ({}, ["--max_seq_length", "161"], "this model takes 3 to 160 tokens"),
    "unknown device": ({}, ["--device", "tpu"], "--device tpu: "),
    "no output folder": ({}, ["--bad_case_path", "none/b.txt"], "none/b.txt: no folder"),
    "no page folder": ({}, ["--report_path", "none/r.html"], "none/r.html: no folder"),
    "page over an input": (
        {},
        ["--report_path", "data/dev.txt"],
        "data/dev.txt: it is an input",
    ),
    "one file for two": ({}, ["--json_path", "r", "--report_path", "r"], "r: it is another result"),
    "too few to tune": (
        {"dev.txt": "a\t\n" * 4},
        ["--tune_thresholds"],
        "needs at least 5 samples in dev.txt",
    ),
}
if not paddle.is_compiled_with_cuda():
    FAULTS["gpu on a CPU build"] = {}, ["--device", "gpu"], "--device gpu: "


@pytest.mark.parametrize("flags", [["--tune_thresholds"], ["--report_path", "r.html"]])
def test_a_dev_set_that_is_too_large_to_keep(run, monkeypatch, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(evaluate, "CELL_BYTES", 1 + memory // (2 * 41 * 20))
    status, _, error = run(*flags)
    assert status == 2 and "bytes x 41 texts x 20 labels" in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    assert run("--skip_train")[0] == 0  # which keeps nothing


@pytest.mark.parametrize("fault", FAULTS)
def test_errors(run, data, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    files, flags, message = FAULTS[fault]
    folder = shutil.copytree(data, tmp_path / "data")
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content, "utf-8")
    (tmp_path / "bad_case.txt").write_text("old")
    status, _, error = run(*flags, dataset_dir=folder)
    assert status == 2 and "Traceback" not in error
    assert message in error[error.index("error: ") :].splitlines()[0]
    assert (tmp_path / "bad_case.txt").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad_case.txt", "data"]


def test_the_label_file_may_be_missing(run, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "label.txt").unlink()
    assert run("--skip_train", dataset_dir=folder)[0] == 0
