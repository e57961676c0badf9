"""benchmarks/serving_load.py and serving_hostile.py on all three servers, in small."""

import re

import pytest
from conftest import REPO, SAMPLE, needs_package

import utils

for package in ("fastapi", "uvicorn", "tritonclient", "pytriton", "paddle_serving_server"):
    needs_package(package)
TEXTS = utils.read_examples(SAMPLE / "dev.txt", utils.read_labels(SAMPLE / "label.txt"))[0]


@pytest.fixture
def flags(bundle, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:100]) + "\n", encoding="utf-8")
    prefix = str(bundle / "float32")
    return ["--model_path_prefix", prefix, "--data_file", str(tmp_path / "texts.txt")]


def table(out):
    """The rows of a Markdown table as dictionaries."""
    rows = [re.split(r" *\| *", line.strip("| \n")) for line in out.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_load(flags, capsys):
    import serving_load

    serving_load.main([*flags, "--seconds", "2", "--turns", "2", "--clients", "3"])
    rows = table(capsys.readouterr().out)
    asked = [(row["server"], row["clients"], row["texts"]) for row in rows]
    one = [("in_process", "1", "1"), ("in_process", "3", "1")]
    one += [(name, "3", "1") for name in serving_load.servers.CLIENTS]
    many = [(name, clients, "1-8") for name, clients, _ in one]
    assert asked == [*one, *many, ("in_process", "1", "all")]
    for row in rows:
        assert float(row["req/s"]) > 0 and row["errors"] == row["wrong"] == "0", row
        assert float(row["p50_ms"]) <= float(row["p99_ms"]) and float(row["cpu_ms"]) > 0
        assert int(row["MB"]) > 50


def test_a_wrong_answer_is_seen(flags, capsys, monkeypatch):
    import serving_load

    def ask(texts):
        return [(["准予离婚"], [0.6])] * len(texts)

    client = "simple_serving", lambda server: ask
    monkeypatch.setitem(serving_load.servers.CLIENTS, "simple_serving", client)
    with pytest.raises(SystemExit) as stopped:
        serving_load.main([*flags, "--seconds", "1", "--servers", "simple_serving"])
    assert stopped.value.code == 1
    assert all(int(row["wrong"]) > 0 for row in table(capsys.readouterr().out))


def test_hostile_requests(flags, capsys, monkeypatch):
    """Every kind of request in serving_hostile.hostile, and some random ones."""
    import serving_hostile

    monkeypatch.setattr(serving_hostile, "SLOW_SECONDS", 6)
    monkeypatch.setattr(serving_hostile, "READY_LIMIT", 30)  # the machine may be busy
    serving_hostile.main([*flags, "--requests", "200"])
    rows = table(capsys.readouterr().out)
    assert [row["server"] for row in rows] == list(serving_hostile.GOOD)
    for row in rows:
        assert row["deaths"] == row["wrong"] == row["failed"] == "0", row
        assert int(row["good_requests"]) > 20 and int(row["4xx"]) > 50 and int(row["2xx"]) > 0, row
    nginx = (REPO / "deploy/triton_serving/nginx.conf").read_text(encoding="utf-8")
    for old in ("listen 8080;", "127.0.0.1:8081", "127.0.0.1:8000", "/tmp/nginx_seqcls"):
        assert old in nginx  # what benchmarks/servers.py replaces
