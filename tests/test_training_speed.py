"""benchmarks/training_speed.py: its times, FLOPs and table; two systems in small."""

import argparse
import json
import os
import re
import sys

import pytest
import training_speed
from conftest import REPO, needs_environment

import utils

# Logs as train.py does; a step takes SECONDS, and twice as long with --batching random.
TRAIN = """
import argparse, os, sys, datetime
parser = argparse.ArgumentParser()
for name in "device epochs logging_steps batch_size max_seq_length dataset_dir".split():
    parser.add_argument("--" + name, required=True)
parser.add_argument("--model_name", required=True)
parser.add_argument("--save_dir", required=True)
parser.add_argument("--batching", default="sorted")
args = parser.parse_args()
assert (args.device, args.batch_size, args.max_seq_length) == ("cpu", "32", "128")
seconds = SECONDS * (2 if args.batching == "random" else 1)
moment = datetime.datetime(2026, 1, 31, 23, 59, 59)  # a day ends within the epoch
for step in range(1, sum(1 for _ in open(args.dataset_dir + "/train.txt")) // 32 + 1):
    moment += datetime.timedelta(seconds=seconds)
    time = moment.strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
    line = f"global step {step}, epoch: 1, batch: {step}, loss: 0.5, micro f1 score: 0.1"
    print(f"\\033[32m[{time}] [    INFO]\\033[0m - {line}, speed: {NUMERATOR / seconds:.2f} step/s",
          file=sys.stderr)
"""
TORCH_PYTHON = """#!PYTHON
import sys, json
script, *flags = sys.argv[1:]
assert script.endswith("hf_trainer.py")
seconds = {"padded": 32, "dynamic": 16, "grouped": 2}
(batching,) = (seconds[f.partition("=")[2]] for f in flags if f.startswith("--batching="))
print(json.dumps({"seconds": batching / (2 if "--bf16" in flags else 1)}))
"""


def table(out):
    """The rows of the Markdown table by the first cell, without the second."""
    rows = [re.split(r" *\| *", line.strip("| ")) for line in out.splitlines() if line[:1] == "|"]
    return {row[0]: row[2:] for row in rows[2:]}


@pytest.fixture
def flags(tiny_model):
    names = ["--dataset_dir", str(REPO / "data"), "--model_name", str(tiny_model)]
    return [*names, "--texts", "128", "--rounds", "1"]


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """fake_train(name, seconds of a step, numerator of its speed) makes a folder with a train.py;
    the sgemm limit is 100 GFLOP/s."""
    monkeypatch.setattr(training_speed.common, "in_new_process", lambda function: 100.0)

    def make(name, seconds, numerator="1"):
        (tmp_path / name).mkdir()
        text = TRAIN.replace("SECONDS", seconds).replace("NUMERATOR", numerator)
        (tmp_path / name / "train.py").write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


def test_systems(flags, fake_train, tmp_path, monkeypatch, capsys):
    """Every kind of system, with a script in place of the training."""
    torch_python = tmp_path / "python"
    torch_python.write_text(TORCH_PYTHON.replace("PYTHON", sys.executable), encoding="utf-8")
    torch_python.chmod(0o755)
    monkeypatch.setattr(training_speed.common, "TRAIN", fake_train("now", "1") / "train.py")
    monkeypatch.setattr(training_speed, "processor_flags", lambda: {"avx2", "avx512_bf16"})
    monkeypatch.setattr(training_speed, "training_flops", lambda *_: 128e9)  # of any set of texts
    flags += ["--torch_python", str(torch_python), "--before", str(fake_train("before", "2"))]
    flags += ["--original", str(fake_train("original", "8", "10")), "--original_texts", "64"]
    systems = [key for key in training_speed.SYSTEMS if key not in ("gloo", "one_core")]
    training_speed.main([*flags, "--systems", *systems])
    out = capsys.readouterr().out
    assert "sgemm limit 100 GFLOP/s\n" in out
    texts = re.findall(r"\| (.*) \| (\d+) texts, \d+ tokens, 128 GFLOP \|", out)
    assert dict(texts)["train.py"] == "128" and dict(texts)["the original's train.py"] == "64"
    assert table(out) == {
        "train.py": ["32.0 (32.0)", "0.50", "2.00", "", "32%"],
        "train.py --batching random": ["16.0 (16.0)", "0.25", "1.00", "", "16%"],
        "train.py of --before": ["16.0 (16.0)", "0.25", "1.00", "", "16%"],
        "the original's train.py": ["4.0 (4.0)", "0.06", "0.25", "", "8%"],
        "Hugging Face, grouped by length": ["64.0 (64.0)", "1.00", "4.00", "", "64%"],
        "Hugging Face, padded to the longest of the batch": ["8.0 (8.0)", "0.12", "0.50", "", "8%"],
        "Hugging Face, padded to 128": ["4.0 (4.0)", "0.06", "0.25", "", "4%"],
        "Hugging Face, grouped by length, bf16": ["128.0 (128.0)", "2.00", "8.00", "", "128%"],
    }


def test_one_core(flags, fake_train, monkeypatch, capsys):
    """A step takes as many seconds as there are cores, and the next system has them all again."""
    cores = os.sched_getaffinity(0)
    folder = fake_train("now", "len(os.sched_getaffinity(0))")
    monkeypatch.setattr(training_speed.common, "TRAIN", folder / "train.py")
    training_speed.main([*flags, "--systems", "one_core", "train"])
    rows = table(capsys.readouterr().out).values()
    assert [row[0].split()[0] for row in rows] == ["32.0", f"{32 / len(cores):.1f}"]
    assert [row[3] for row in rows] == ["1.00", f"{1 / len(cores):.2f}"]
    assert os.sched_getaffinity(0) == cores


def test_real_runs(flags, capsys):
    """train.py's log has what the times are made of, also in two processes."""
    training_speed.main([*flags, "--systems", "train", "gloo"])
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["train.py", "train.py, two gloo processes"]
    for speed, *ratios, share in rows.values():
        assert float(speed.split()[0]) > 0 and ratios == [""] * 3 and share.endswith("%")


def test_training_flops():
    """Texts of 3 tokens and 1, hidden size 2, feed-forward size 3, 5 labels, by hand."""
    products = {
        "query, key, value, output": 4 * 2 * (4 * 2 * 2),  # 4 tokens through 2 x 2 weights
        "feed-forward": 2 * 2 * (4 * 2 * 3),
        "Q K": 2 * (3 * 3 * 2 + 1 * 1 * 2),
        "probabilities V": 2 * (3 * 3 * 2 + 1 * 1 * 2),
    }
    head = 2 * (2 * 2 * 2) + 2 * (2 * 2 * 5)  # pooler and classifier, on 2 texts
    config = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 7}
    expected = 3 * (7 * sum(products.values()) + head)
    assert training_speed.training_flops(config, [3, 1], 5) == expected == 6552


@pytest.mark.parametrize("steps", [[1, 2, 4], [2, 3, 4], []])
def test_log_without_a_step(steps):
    line = "[2026-01-01 00:00:00,000] [    INFO] - global step %d, epoch: 1, speed: 2.00 step/s\n"
    with pytest.raises(utils.UserError, match=f"^t.py: log lines of {len(steps)} steps, not of 4;"):
        training_speed.epoch_seconds("t.py", "".join(line % step for step in steps), 4)


def test_bad_arguments(flags, tmp_path, monkeypatch, run_cli):
    monkeypatch.setattr(training_speed, "processor_flags", lambda: {"avx2"})
    torch = ["--torch_python", "python"]
    for more, message in (
        (["--texts", "160"], "--texts 160: must be a multiple of 64"),
        (["--original_texts", "50"], "--original_texts 50: must be a multiple of 32"),
        (["--before", str(tmp_path)], f"--before {tmp_path}: has no train.py"),
        (["--systems", "train", "original"], "--systems original: needs --original"),
        (["--systems", "hf_padded"], "--systems hf_padded: needs --torch_python"),
        (
            [*torch, "--systems", "hf_bf16"],
            "--systems hf_bf16: needs a processor with amx_bf16 or avx512_bf16",
        ),
        (
            ["--texts", "6400"],
            f"{REPO / 'data' / 'train.txt'}: 2000 texts, fewer than the 6400 wanted",
        ),
    ):
        status, error = run_cli(training_speed.main, [*flags, *more])
        assert (status, error.splitlines()[-1]) == (2, f"error: {message}"), more


def test_all_systems_that_can_run(flags, monkeypatch):
    monkeypatch.setattr(training_speed, "processor_flags", lambda: {"amx_bf16"})
    own = ["train", "random", "gloo", "one_core"]
    assert training_speed.parse_args(flags).systems == own
    hugging_face = ["hf_grouped", "hf_dynamic", "hf_padded", "hf_bf16"]
    flags += ["--torch_python", "python"]
    assert training_speed.parse_args(flags).systems == [*own, *hugging_face]
    monkeypatch.setattr(training_speed, "processor_flags", set)
    assert training_speed.parse_args(flags).systems == [*own, *hugging_face[:-1]]


def test_hugging_face_groups_by_length(tiny_model, tmp_path):
    """Trainer ignores what it can't use without a word; the padding shows that it does not."""
    python = needs_environment("TORCH_PYTHON")
    args = argparse.Namespace(dataset_dir=REPO / "data", model_name=tiny_model)
    data = training_speed.small_set(args, 640, tmp_path / "data")
    output = training_speed.common.run(
        REPO / "benchmarks" / "hf_trainer.py",
        python=python,
        dataset_dir=data.folder,
        model_name=tiny_model,
        batching="grouped",
    )
    result = json.loads(output.splitlines()[-1])
    assert result["seconds"] > 0 and 0 < result["padding"] < random_padding(data, tiny_model) / 2


def random_padding(data, model_name):
    """The share of tokens that padding adds to batches of 32 texts in file order."""
    _, (texts, _) = training_speed.common.read_data(data.folder, "train.txt")
    encoded, _ = utils.encode(texts, utils.load_tokenizer(model_name), 128)
    padded = sum(utils.pad(batch)["input_ids"].size for batch in utils.chunks(encoded, 32))
    return padded / data.tokens - 1
