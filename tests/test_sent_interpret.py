"""analysis/sent_interpret.py: the format of its result and the forms of its input."""

import os
import re
import shutil

import numpy as np
import pytest
from conftest import needs_package

needs_package("trustai")
import evaluate  # noqa: E402
import sent_interpret  # noqa: E402
import trustai_compat  # noqa: E402


@pytest.fixture
def data(hard_data, tmp_path):
    return shutil.copytree(hard_data, tmp_path / "data")


@pytest.fixture
def run(data, checkpoint, run_cli):
    def run(content, *flags):
        if content is not None:
            (data / "bad_case.txt").write_text(content, "utf-8")
        own = ["--device", "cpu", "--dataset_dir", data, "--params_path", checkpoint]
        status, error = run_cli(sent_interpret.main, [*own, *flags])
        path = data / "sent_interpret.txt"
        return status, error, path.read_text("utf-8") if path.exists() else None

    return run


def test_result(run, data, checkpoint):
    text = "婚生女罗某1随被告生活，原告每月给付1000元抚养费。"
    status, error, result = run(f"{text}\t支付抚养费\t婚后有子女\n婚后分居多年。\n", "--top_k", "2")
    assert status == 0
    assert f"Evidence for 2 texts saved in {data / 'sent_interpret.txt'}" in error
    blocks = result.split("\n\n")
    assert len(blocks) == 3 and blocks[2] == ""  # a blank line after each
    lines = blocks[0].split("\n")
    assert lines[:4] == [
        f"text: {text}",
        "predict label: 婚后有子女",
        "label: 支付抚养费",
        "examples with positive influence",
    ]
    assert blocks[1].split("\n")[:3] == ["text: 婚后分居多年。", "predict label: ", "label: "]
    train = [line.split("\t") for line in (data / "train.txt").read_text("utf-8").splitlines()]
    encoder = trustai_compat.Encoder(checkpoint, "cpu")
    features = encoder.features([text, *(t for t, _ in train)], "x")
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features[1:] @ features[0]
    best = np.argsort(-similarity)[:2]
    assert len(lines) == 6
    for rank, (line, i) in enumerate(zip(lines[4:], best), 1):
        match = re.fullmatch(r"support(\d) text: (.*)\tlabel: (.*)\tscore: (\d\.\d{5})", line)
        assert match.groups()[:3] == (str(rank), *train[i])
        assert float(match[4]) == pytest.approx(similarity[i], abs=2e-5)


def test_reads_what_evaluate_writes(run, data, checkpoint):
    """bad_case.txt has other columns than the default order; its header says which."""
    bad = str(data / "bad_case.txt")
    argv = ["--device", "cpu", "--dataset_dir", str(data), "--params_path", str(checkpoint)]
    evaluate.main([*argv, "--skip_train", "--bad_case_path", bad])
    header, *lines = (data / "bad_case.txt").read_text("utf-8").splitlines()
    assert header == "Prediction\tLabel\tText" and lines
    status, _, result = run(None)
    assert status == 0
    for line, block in zip(lines, result.split("\n\n")):
        prediction, label, text = line.split("\t")
        expected = [f"text: {text}", f"predict label: {prediction}", f"label: {label}"]
        assert block.split("\n")[:3] == expected


def test_input_is_read_once(run, data, checkpoint):
    """It may be a pipe; what a text holds beside line feeds does not end a line."""
    texts = [f"原告第{i}次起诉\u2028要求离婚\x85分割\r财产。" for i in range(300)]
    reader, writer = os.pipe()
    os.write(writer, "".join(f"{text}\t准予离婚\n" for text in texts).encode())
    os.close(writer)
    status, _, _ = run(None, "--interpret_input_file", f"/dev/fd/{reader}")
    os.close(reader)
    result = (data / "sent_interpret.txt").read_bytes().decode()
    assert status == 0 and "\r" not in result
    assert re.findall("^text: (.*)\n", result, re.M) == [text.replace("\r", " ") for text in texts]


def test_the_checkpoint_is_not_replaced(run, checkpoint):
    before = (checkpoint / "config.json").read_bytes()
    status, error, _ = run("a\n", "--interpret_result_file", checkpoint / "config.json")
    assert status == 2 and "config.json: it is an input of this command" in error
    assert (checkpoint / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "content, expected",
    [
        ("甲\n乙\tb\n丙\tc\td\n", [("甲", "", ""), ("乙", "b", ""), ("丙", "c", "d")]),
        ("Text\tLabel\tPrediction\n甲\ta\tb\n", [("甲", "a", "b")]),
        ("Prediction\tLabel\tText\nb\ta\t甲\n", [("甲", "a", "b")]),
        ("text\tlabel\n甲\ta\n\n", [("甲", "a", "")]),
        ("\ufeffText\r\n甲\r\n", [("甲", "", "")]),
    ],
    ids=["1 to 3 fields", "header", "evaluate's header", "predict's header", "BOM and CRLF"],
)
def test_input_forms(tmp_path, content, expected):
    (tmp_path / "in.txt").write_bytes(content.encode("utf-8"))
    records = sent_interpret.read_input(tmp_path / "in.txt")
    assert [(r["text"], r["label"], r["prediction"]) for r in records] == expected


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (
            "a\tb\tc\td\n",
            [],
            "bad_case.txt:1: 4 fields separated by tabs; 3 are expected: text, label",
        ),
        (
            "Text\tLabel\na\tb\tc\n",
            [],
            "bad_case.txt:2: 3 fields separated by tabs; 2 are expected",
        ),
        ("Text\tLabel\n\n", [], "bad_case.txt: no texts; evaluate.py --bad_case_path writes"),
        (None, [], "bad_case.txt: No such file; evaluate.py --bad_case_path writes"),
        (
            "Prediction\tLabel\tText\n准予离婚\n",
            [],
            "bad_case.txt:2: 1 fields, no text; see the first",
        ),
        ("准予离婚\t婚后分居\t双方不和。\n", [], "the first column holds labels, not texts; keep"),
        ("a\n", ["--interpret_result_file", "train.txt"], "train.txt: it is an input of this"),
        ("a\n", ["--interpret_result_file", "no/x.txt"], "x.txt: no folder"),
        ("a\n", ["--params_path", "none"], "none: no such folder"),
    ],
    ids=[
        *("four fields", "more than the header", "empty", "missing", "less than the header"),
        *("header lost", "over an input", "no folder", "no checkpoint"),
    ],
)
def test_errors(run, content, flags, message):
    status, error, result = run(content, *flags)
    assert status == 2 and message in error and result is None and "Traceback" not in error
