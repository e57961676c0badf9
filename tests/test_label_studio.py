"""data/label_studio.py: predictions become tasks that people correct and doccano.py reads."""

import json
from xml.etree import ElementTree

import doccano
import label_studio
import pytest

ROWS = [
    {
        "text": "要求离婚\t分割",
        "labels": ["离婚", "财产"],
        "scores": {"离婚": 0.9, "财产": 0.6, "债": 0.2},
    },
    {"text": "没有争议", "labels": [], "scores": {"离婚": 0.1, "财产": 0.05, "债": 0.01}},
]


@pytest.fixture
def convert(tmp_path, run_cli):
    """convert(rows, *flags) returns (exit status, stderr); the tasks come to tmp_path."""

    def convert(rows, *flags):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "output.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
        argv = ["--input_file", tmp_path / "output.jsonl", "--output_file", tmp_path / "tasks.json"]
        return run_cli(label_studio.main, [*argv, *flags])

    return convert


def test_tasks_with_predictions(convert, tmp_path):
    status, error = convert(ROWS, "--model_version", "v2")
    assert status == 0 and f"INFO] - Save 2 tasks to {tmp_path / 'tasks.json'}." in error
    choices = {"from_name": "label", "to_name": "text", "type": "choices"}
    choices["value"] = {"choices": ["离婚", "财产"]}
    first = {"model_version": "v2", "score": 0.6, "result": [choices]}
    assert json.loads((tmp_path / "tasks.json").read_text("utf-8")) == [
        {"data": {"text": "要求离婚\t分割"}, "predictions": [first]},
        {
            "data": {"text": "没有争议"},
            "predictions": [{"model_version": "v2", "score": 0.9, "result": []}],
        },
    ]
    assert convert([{"text": "文", "labels": ["甲"]}])[0] == 0  # without --output_scores
    (task,) = json.loads((tmp_path / "tasks.json").read_text("utf-8"))
    assert "score" not in task["predictions"][0]


@pytest.mark.parametrize("source", ["scores", "label file"])
def test_configuration_fits_the_tasks(tmp_path, capfd, source):
    rows = ROWS if source == "scores" else [{"text": "文", "labels": ["债"]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "output.jsonl").write_text(lines, "utf-8")
    (tmp_path / "label.txt").write_text("离婚\n财产\n债\n<\"&'>\n", "utf-8")
    argv = ["--input_file", tmp_path / "output.jsonl", "--output_file", tmp_path / "tasks.json"]
    argv += ["--from_name", "要素", "--to_name", "正文"]
    argv += ["--label_file", tmp_path / "label.txt"] if source == "label file" else []
    label_studio.main([str(arg) for arg in argv])
    view = ElementTree.fromstring(capfd.readouterr().out)
    choices = view.find("Choices")
    names = ["离婚", "财产", "债"] + (["<\"&'>"] if source == "label file" else [])
    assert [choice.get("value") for choice in choices] == names
    assert choices.attrib == {"name": "要素", "toName": "正文", "choice": "multiple"}
    assert view.find("Text").attrib == {"name": "正文", "value": "$text"}
    (result,) = json.loads((tmp_path / "tasks.json").read_text("utf-8"))[0]["predictions"][0][
        "result"
    ]
    assert (result["from_name"], result["to_name"]) == ("要素", "正文")


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            ["text\tlabel", "文\t甲"],
            ":1: no prediction; predict.py --output_file x.jsonl writes such",
        ),
        ([*ROWS, "[]"], ":3: no prediction; predict.py --output_file x.jsonl writes such lines"),
        ([{"text": "文", "labels": "甲"}], ":1: no prediction; predict.py --output_file x.jsonl"),
        ([], ": empty file; predict.py --output_file x.jsonl writes one"),
        (
            [ROWS[1], {"text": "文", "labels": ["甲"]}],
            ":2: label '甲' is not in --label_file; give",
        ),
    ],
    ids=["TSV", "list", "string", "empty", "unknown label"],
)
def test_faults(convert, tmp_path, rows, message):
    (tmp_path / "label.txt").write_text("离婚\n财产\n", "utf-8")
    status, error = convert(rows, "--label_file", tmp_path / "label.txt")
    assert status == 2 and error.startswith(f"error: {tmp_path / 'output.jsonl'}{message}"), error
    assert not (tmp_path / "tasks.json").exists()


def test_inputs_are_not_replaced(convert, tmp_path):
    status, error = convert(ROWS, "--output_file", tmp_path / "output.jsonl")
    assert status == 2 and "it is an input of this command; give another name" in error


def test_corrected_predictions_come_back(convert, tmp_path, run_cli):
    """One accepted, one corrected, one not submitted; doccano.py ignores the predictions."""
    assert convert([*ROWS, {**ROWS[0], "text": "无人提交"}])[0] == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text("utf-8"))
    corrected = [{**tasks[0]["predictions"][0]["result"][0], "value": {"choices": ["债"]}}]
    for number, task in enumerate(tasks, 1):
        task |= {"id": number, "annotations": []}
    tasks[0]["annotations"] = [{"result": tasks[0]["predictions"][0]["result"]}]
    tasks[1]["annotations"] = [{"result": corrected}]
    (tmp_path / "export.json").write_text(json.dumps(tasks), "utf-8")
    argv = ["--doccano_file", tmp_path / "export.json", "--save_dir", tmp_path / "out"]
    argv += ["--splits", "1", "--is_shuffle", "False"]
    status, error = run_cli(doccano.main, argv)
    assert status == 0 and "Left out 1 tasks without annotation." in error
    train = (tmp_path / "out" / "train.txt").read_text("utf-8")
    assert train == "要求离婚 分割\t离婚,财产\n没有争议\t债\n"


def test_predictions_come_back_from_doccano(tmp_path, run_cli):
    """As doccano 1.8.4 exports output.jsonl imported with Column Label = labels."""
    record = {"id": 1, "text": "文", "scores": {"离婚": 0.9}, "label": ["离婚"], "Comments": []}
    (tmp_path / "export.jsonl").write_text(json.dumps(record), "utf-8")
    argv = ["--doccano_file", tmp_path / "export.jsonl", "--save_dir", tmp_path / "out"]
    assert run_cli(doccano.main, [*argv, "--splits", "1"])[0] == 0
    assert (tmp_path / "out" / "train.txt").read_text("utf-8") == "文\t离婚\n"
