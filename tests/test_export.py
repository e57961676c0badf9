"""export_model.py: what is in a bundle, that it equals the trained model, what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle.inference
import predictor
import pytest
from conftest import GRAPH_FILES, REPO, SAMPLE

import export_model
import metric
import model as models
import utils

FILES = GRAPH_FILES | {
    "MODEL_CARD.md",
    "config.json",
    "tokenizer_config.json",
    "vocab.txt",
}


@pytest.mark.core
def test_files_and_names(bundle, checkpoint):
    assert {p.name for p in bundle.iterdir()} == {*FILES, "model.onnx"}
    info, trained = utils.read_model_info(bundle), utils.read_model_info(checkpoint)
    assert (info.labels, info.max_seq_length) == (trained.labels, trained.max_seq_length)
    assert (bundle / "vocab.txt").read_bytes() == (checkpoint / "vocab.txt").read_bytes()
    prefix = bundle / "float32"
    config = paddle.inference.Config(*map(str, utils.static_graph(prefix)))
    config.disable_glog_info()
    static = paddle.inference.create_predictor(config)
    assert static.get_input_names() == ["input_ids", "token_type_ids"]
    assert static.get_output_names() == ["logits"]
    session = predictor.open_session(prefix)
    assert [i.name for i in session.get_inputs()] == ["input_ids", "token_type_ids"]
    assert [o.name for o in session.get_outputs()] == ["logits"]


@pytest.mark.core
@pytest.mark.parametrize("long_text", ["truncate", "window"])
def test_bundle_onnx_and_model_agree_on_the_dev_set(bundle, checkpoint, long_text):
    texts, _ = utils.read_examples(SAMPLE / "dev.txt", utils.read_labels(SAMPLE / "label.txt"))
    model, info = models.load_checkpoint(checkpoint)
    if long_text == "window":
        texts = [*texts[:80], *map("".join, utils.chunks(texts, 8))]
    tokenizer = utils.load_tokenizer(bundle)
    encoded, long = utils.encode(texts, tokenizer, info.max_seq_length, long_text)
    assert long >= 50 if long_text == "window" else long < 20
    forwards = [
        models.dygraph_forward(model),
        models.static_forward(bundle / "float32"),
        predictor.onnx_forward(predictor.open_session(bundle / "float32")),
    ]
    trained, *others = (utils.logits_of(forward, encoded, 32, 20) for forward in forwards)
    decisions = metric.decode(metric.probabilities(trained))
    assert decisions.any(axis=1).mean() > 0.5
    for logits in others:
        np.testing.assert_allclose(logits, trained, rtol=0, atol=1e-4)
        assert np.array_equal(metric.decode(metric.probabilities(logits)), decisions)


@pytest.mark.core
def test_the_decision_rule_travels(checkpoint, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(checkpoint, tuned)
    thresholds = [0.3 + 0.01 * i for i in range(20)]
    config = utils.read_json(tuned / "config.json")
    (tuned / "config.json").write_text(json.dumps({**config, "thresholds": thresholds}))
    flags = ["--params_path", str(tuned), "--output_path", str(tmp_path / "export")]
    export_model.main([*flags, "--min_labels", "1", "--max_labels", "2"])
    info = utils.read_model_info(tmp_path / "export")
    rule = {"thresholds": thresholds, "min_labels": 1, "max_labels": 2}
    assert info.rule == rule and utils.read_model_info(tuned).rule == {
        **{"thresholds": thresholds, "min_labels": 0, "max_labels": None}
    }


def test_a_label_file_beside_the_weights_that_names_others(checkpoint, tmp_path, run_cli):
    source = shutil.copytree(checkpoint, tmp_path / "model")
    labels = utils.read_model_info(source).labels
    args = ["--params_path", source, "--output_path", tmp_path / "export"]
    (source / "label.txt").write_text("\n".join(labels[::-1]), encoding="utf-8")
    message = f"{source / 'label.txt'}:1: '{labels[-1]}' where the model has '{labels[0]}'; "
    message = f"error: {message}give the label file that it was trained with\n"
    assert run_cli(export_model.main, args) == (2, message)
    assert not (tmp_path / "export").exists()
    (source / "label.txt").write_text("\n".join(labels), encoding="utf-8")
    assert run_cli(export_model.main, args)[0] == 0


def test_export_that_differs_leaves_nothing(checkpoint, tmp_path, run_cli, monkeypatch):
    def wrong(prefix, right=models.static_forward):
        forward = right(prefix)
        return lambda **batch: forward(**batch) + 3e-4

    monkeypatch.setattr(models, "static_forward", wrong)
    args = ["--params_path", checkpoint, "--output_path", tmp_path / "export"]
    status, err = run_cli(export_model.main, args)
    assert status == 2 and re.search("the logits of the static graph differ by [23].*e-04", err)
    assert not (tmp_path / "export").exists()


@pytest.mark.core
def test_failed_export_keeps_the_old_bundle(checkpoint, tmp_path, run_cli, monkeypatch):
    args = ["--params_path", checkpoint, "--output_path", tmp_path / "export"]
    assert run_cli(export_model.main, args)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir()}
    monkeypatch.setattr(models, "MAX_DIFFERENCE", -1.0)
    assert run_cli(export_model.main, args)[0] == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "export").iterdir()} == before


def test_new_export_removes_onnx_files_of_the_old_weights(bundle, checkpoint, tmp_path):
    target = tmp_path / "export"
    shutil.copytree(bundle, target)
    (target / "int8_model.onnx").write_bytes(b"old")
    export_model.main(["--params_path", str(checkpoint), "--output_path", str(target)])
    assert {p.name for p in target.iterdir()} == FILES


@pytest.mark.core
def test_export_needs_no_data(checkpoint, tmp_path):
    """The user's own data/ may hold anything, or nothing."""
    for path in (*REPO.glob("*.py"), REPO / "analysis" / "model_card.py"):
        copy = tmp_path / path.relative_to(REPO)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    command = [sys.executable, tmp_path / "export_model.py", "--params_path", checkpoint]
    subprocess.run([str(c) for c in command], cwd=tmp_path, check=True, capture_output=True)
    assert {p.name for p in (tmp_path / "export").iterdir()} == FILES


def test_killed_while_the_files_are_moved(checkpoint, tmp_path, monkeypatch, run_cli):
    """After any number of moved files the folder is whole, or no reader takes it."""
    args = ["--params_path", checkpoint, "--output_path", tmp_path / "export", "--onnx"]
    replace, moves = os.replace, 0

    def killed(source, target):
        nonlocal moves
        if Path(target).parent == tmp_path / "export":
            if moves == 0:
                raise ZeroDivisionError
            moves -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    last = len(FILES)  # of the moves, config.json
    for count in (0, last // 2, last):
        moves = count
        with pytest.raises(ZeroDivisionError):
            export_model.main([str(a) for a in args])
        with pytest.raises(utils.UserError, match="no such folder|config.json"):
            predictor.Predictor(tmp_path / "export" / "float32")
        shutil.rmtree(tmp_path / "export")
    moves = last + 1
    assert run_cli(export_model.main, args)[0] == 0
    assert predictor.Predictor(tmp_path / "export" / "float32").predict(["婚后生育一子。"])[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--params_path", "no/such"], "no/such: no such folder; train.py or export"),
        (["--min_labels", "2", "--max_labels", "1"], "min_labels 2, max_labels 1: the model has"),
        (["--output_path", "CHECKPOINT"], "holds a checkpoint; give another folder"),
        (["--output_path", "FILE"], "cannot write"),
    ],
)
def test_bad_flags(checkpoint, tmp_path, run_cli, flags, message):
    (tmp_path / "file").write_text("x")
    names = {"CHECKPOINT": checkpoint, "FILE": tmp_path / "file"}
    flags = [names.get(flag, flag) for flag in flags]
    defaults = ["--params_path", checkpoint, "--output_path", tmp_path / "export"]
    status, err = run_cli(export_model.main, [*defaults, *flags])
    assert status == 2 and message in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
