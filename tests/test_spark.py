"""deploy/spark: a real Spark of two executors gives infer.py's labels, also when one is killed.

SPARK_PYTHON names the Python of an environment with deploy/spark/requirements.txt; CI has one.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SAMPLE, needs_environment

sys.path.insert(0, str(REPO / "deploy" / "spark"))
import label
import label_worker
from predictor import Predictor

import utils

LINES = [*utils.read_texts(SAMPLE / "train.txt"), *utils.read_texts(SAMPLE / "dev.txt")]
TEXTS = [line.split("\t")[0] for line in LINES]
LABELS = utils.read_labels(SAMPLE / "label.txt")
JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData"  # for a short life
CONF = {
    "spark.log.level": "WARN",
    "spark.ui.enabled": "false",
    "spark.task.maxFailures": "2",
}
COLUMN = "正文 `a.b`"
STEPS = {
    "executor killed": "--input types.parquet --output types --output_scores --partitions 8",
    "worker killed": "--input data.txt --output text --output_format text --partitions 8",
    "hard": "--input hard.parquet --output hard --output_format json --output_scores",
    "exists": "--input hard.parquet --output hard --output_format json",
    "overwritten": "--input hard.parquet --output hard --output_format csv --overwrite "
    "--use_quantize --output_scores --column_prefix new_ --min_labels 1",
    "no column": "--input hard.parquet --output no --text_column body",
    "no string": "--input hard.parquet --output no --text_column id",
    "clash": "--input types --output no --input_format parquet",
    "holds the input": "--input hard.parquet --output . --overwrite",
    "too many columns": "--input hard.parquet --output no --output_format text",
    "no input": "--input none.parquet --output no",
    "no format": "--input hard.parquet --output no --output_format docx",
    "task failed": "--input hard.parquet --output no --shared_model",
}


@pytest.fixture(scope="module")
def names(bundle):
    return Predictor(bundle / "float32").predict(TEXTS)


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory):
    """The folder in which label.py ran for each of STEPS, all in one application."""
    python = Path(needs_environment("SPARK_PYTHON"))
    folder = tmp_path_factory.mktemp("spark")
    shutil.copytree(bundle, folder / "export")
    (folder / "data.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    steps = []
    for name, words in STEPS.items():
        prefix = "export/float32"
        if name == "hard":  # all executors find the bundle there
            prefix, words = folder / prefix, f"{words} --shared_model"
        argv = ["--model_path_prefix", str(prefix), *words.split(), "--logging_seconds", "0.2"]
        argv += ["--text_column", COLUMN] if "types" in words else []
        steps.append({"argv": argv})
    steps[0] |= {"kill": "executor", "compare": "types"}
    steps[1] |= {"kill": "worker"}
    steps[2] |= {"keep": ["hard", "hard_json"]}  # before it is overwritten
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    # Executors write below Spark's home: here, not in the environment.
    (package,) = python.parent.parent.glob("lib/python3*/site-packages/pyspark")
    (folder / "home").mkdir()
    for entry in package.iterdir():
        (folder / "home" / entry.name).symlink_to(entry)
    java = f"{JAVA} -Djava.io.tmpdir={folder}"
    submit = [folder / "home" / "bin" / "spark-submit", "--master", "local-cluster[2,1,1024]"]
    options = {f"spark.{side}.extraJavaOptions": java for side in ("driver", "executor")}
    for key, value in (CONF | options).items():
        submit += ["--conf", f"{key}={value}"]
    env = {**os.environ, "SPARK_HOME": str(folder / "home"), "PYSPARK_PYTHON": str(python)}
    env |= {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_LOCAL_DIRS": str(folder / "local")}
    env |= {"PATH": f"{python.parent}:{env['PATH']}", "SPARK_SUBMIT_OPTS": java}
    command = [*submit, REPO / "tests" / "spark_app.py", folder]
    with open(folder / "spark.log", "wb") as log:
        run = subprocess.run(command, stdout=log, stderr=log, env=env, cwd=folder)
    assert run.returncode == 0, (folder / "spark.log").read_text("utf-8")[-4000:]
    return folder


@pytest.fixture
def step(folder):
    """step(name): what the application says about one of STEPS."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    return dict(zip(STEPS, results, strict=True)).__getitem__


def parts(folder):
    return [part.read_text("utf-8") for part in sorted(folder.glob("part-*"))]


# ------------------------------------------------------------------------------ the same answers
def test_an_executor_killed_in_the_middle(step, folder, bundle, names):
    """All rows once, all columns as they were, infer.py's labels and scores."""
    result = step("executor killed")
    assert result["status"] == 0, result["log"]
    assert result["killed"] and "Lost executor" in (folder / "spark.log").read_text("utf-8")
    assert re.search(r"stage \d+: \d of 8 tasks done, \d running, ", result["log"])
    assert result["same_columns"]
    rows, (expected, probs) = result["rows"], names
    assert [row["labels"] for row in rows] == expected and len(rows) == 2400
    assert [[name for name, _ in row["scores"]] for row in rows] == [LABELS] * 2400
    scores = [[score for _, score in row["scores"]] for row in rows]
    np.testing.assert_allclose(scores, probs, rtol=0, atol=1e-5)
    assert {row["model_sha256"] for row in rows} == {utils.read_model_info(bundle).model_sha256}
    assert "- 2400 rows in " in result["log"]
    assert "- 40 of 2400 texts (1.7%) are longer than max_seq_length 128; their" in result["log"]


def test_a_python_worker_killed_in_the_middle(step, folder, names):
    """From lines of text to lines that train.py can read."""
    result = step("worker killed")
    assert result["status"] == 0 and result["killed"], result["log"]
    (stage,) = result["killed"]
    lost = re.findall(rf"Lost task \S+ in stage {stage}\.", (folder / "spark.log").read_text())
    assert lost
    pairs = zip(TEXTS, names[0])
    found = [line for part in parts(folder / "text") for line in part.splitlines()]
    assert Counter(found) == Counter(f"{text}\t{','.join(given)}" for text, given in pairs)
    assert "- 2400 rows in " in result["log"]


def test_rows_that_cannot_be_labelled(step, folder, names, bundle):
    """They are counted, and the others are labelled; the executors find the bundle by its path."""
    result = step("hard")
    assert result["status"] == 0, result["log"]
    rows = [json.loads(line) for part in parts(folder / "hard_json") for line in part.splitlines()]
    rows.sort(key=lambda row: row["id"])
    assert list(rows[0]) == ["id", "text", "labels", "scores", "model_sha256"]
    of_empty = Predictor(bundle / "float32").predict([""])[0][0]
    expected = [[], of_empty, None, names[0][0], names[0][1], None]
    assert [row["labels"] for row in rows] == expected
    assert [row["scores"] is None for row in rows] == [True, False, True, False, False, True]
    assert len(rows[3]["text"]) > 499_999
    for line in (
        "1 of 6 rows have no text (null); they get no label",
        "1 of 6 rows have an empty text",
        "1 of 6 rows are longer than 500000 bytes; the rest was not labelled",
        "2 of 6 rows are not valid UTF-8; their labels are null",
    ):
        assert result["log"].count(f" WARNING] - {line}\n") == 1, result["log"]


def test_second_run_over_the_output(step, folder):
    """An error; with --overwrite the new result, here int8 and in another format, replaces it."""
    result = step("exists")
    assert result["status"] == 2
    assert result["log"].endswith("error: --output hard: exists; give another, or --overwrite\n")
    result = step("overwritten")
    assert result["status"] == 0, result["log"]
    assert {path.suffix for path in (folder / "hard").glob("part-*")} == {".csv"}
    csv.field_size_limit(1 << 20)
    tables = [list(csv.DictReader(part.splitlines())) for part in parts(folder / "hard")]
    rows = sorted((row for table in tables for row in table), key=lambda row: row["id"])
    assert list(rows[0]) == ["id", "text", "new_labels", "new_scores", "new_model_sha256"]
    assert [bool(row["new_labels"]) for row in rows] == [False, True, False, True, True, False]
    for row in rows:
        if row["new_labels"]:
            scores = json.loads(row["new_scores"])
            assert list(scores) == LABELS and set(row["new_labels"].split(",")) < set(LABELS)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no column", "--text_column body: no such column; there are: id, text; give one of str"),
        ("no string", "--text_column id: bigint; give one of strings"),
        ("clash", "--input: it has a column labels already; give the new columns another --colu"),
        ("holds the input", "--output .: it holds the input file:"),
        ("too many columns", "--output_format text: it holds texts and labels only, the input ha"),
        ("no input", "Spark: [PATH_NOT_FOUND] Path does not exist: file:"),
        ("no format", "Spark: org.apache.spark.SparkClassNotFoundException: [DATA_SOURCE_NOT_FO"),
        ("task failed", "Spark: utils.UserError: export: no such folder; train.py or"),
    ],
)
def test_errors_of_a_job(step, folder, name, message):
    """One line and status 2; no result."""
    result = step(name)
    assert result["status"] == 2
    assert result["log"].splitlines()[-1].startswith(f"error: {message}"), result["log"]
    assert result["log"].count("error: ") == 1 and "Traceback" not in result["log"]
    assert (folder / "hard.parquet").exists() and not list(folder.glob("no/part-*"))


# --------------------------------------------------------------------------------- without Spark
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--input a.docx", "--input a.docx: the suffixes do not name one format; give --input_fo"),
        ("--input a.csv b.json", "--input a.csv b.json: the suffixes do not name one format; giv"),
        ("--input a.csv --input_options sep", "--input_options sep: write KEY=VALUE, e.g. multiL"),
        ("--input a.txt --output_format text --output_scores", "--output_scores: --output_format"),
        ("--input a.txt --max_labels 21", "min_labels 0, max_labels 21: the model has 20 labels;"),
        ("--input a.txt --model_path_prefix export/none", "export: no such folder; train.py or e"),
    ],
)
def test_errors_before_spark_starts(bundle, tmp_path, monkeypatch, run_cli, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    prefix = ["--model_path_prefix", bundle / "float32", "--output", "out"]
    status, error = run_cli(label.main, [*prefix, *flags.split()])
    assert status == 2 and error.splitlines()[-1].startswith(f"error: {message}")


def test_a_text_that_makes_the_model_fail(bundle, monkeypatch, caplog):
    """Its labels are missing, those of the other texts of its batch are not."""
    predictor = Predictor(bundle / "float32")
    names, probs = predictor.predict(TEXTS[:9])
    forward, decide = predictor.decide, []

    def failing(texts):
        decide.append(texts)
        if TEXTS[4] in texts:
            raise RuntimeError("out of luck")
        return forward(texts)

    monkeypatch.setattr(predictor, "decide", failing)
    values = [text.encode() for text in TEXTS[:9]]
    labels, found, counts = label_worker.label_values(predictor, values)
    assert labels == [*names[:4], None, *names[5:]] and found[4] is None
    np.testing.assert_allclose(np.array(found[5:]), probs[5:], rtol=0, atol=1e-5)
    assert (counts["rows"], counts["failed"], counts["texts"]) == (9, 1, 8)


def test_a_character_cut_in_two_at_the_limit(bundle):
    predictor = Predictor(bundle / "float32")
    text = "婚" * (utils.MAX_LINE // 3 + 1)
    labels, _, counts = label_worker.label_values(predictor, [text.encode()])
    assert labels == predictor.predict([text])[0]
    assert (counts["huge"], counts["cut"], counts["not_utf8"]) == (1, 1, 0)


def test_speed_benchmark(tmp_path, monkeypatch, capsys):
    """The start of a run does not count: what is left is texts per second."""
    import common
    import spark_speed

    def run(script, log, use_quantize, **flags):
        folder = Path(flags["input"]).parent if "input" in flags else Path(flags["dataset_dir"])
        file = Path(flags["input"]).name if "input" in flags else flags["data_file"]
        size = len((folder / file).read_text("utf-8").splitlines())
        clock[0] += 5 + size / 100 if script.name == "label.py" else 2 + size / 200

    clock = [0.0]
    monkeypatch.setattr(common, "run", run)
    monkeypatch.setattr(spark_speed.time, "perf_counter", lambda: clock[0])
    for name in ("PYSPARK_PYTHON", "PYSPARK_SUBMIT_ARGS"):
        monkeypatch.setenv(name, "")  # restored afterwards
    flags = ["--model_path_prefix", "export/float32", "--dataset_dir", str(SAMPLE)]
    spark_speed.main([*flags, "--rounds", "1", "--num_threads", "2"])
    row = json.loads(capsys.readouterr().out)
    assert row["texts_per_second"] == {"label.py": 100, "infer.py": 200}
    assert (row["texts"], row["cores"], row["spark_over_infer"]) == (4000, 2, 0.5)
    assert row["hours_for_1e9_texts_on_100_cores"] == 55.56
