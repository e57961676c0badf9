"""train.py: what a run leaves behind, resuming, several processes, bad input."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
from conftest import REPO, SAMPLE, free_port

import model as models
import predict
import train
import utils

BASE = ["--device", "cpu", "--epochs", "2", "--learning_rate", "1e-3", "--logging_steps", "1"]


def argv(data, model, save_dir, *extra):
    paths = ["--dataset_dir", data, "--model_name", model, "--save_dir", save_dir]
    return [str(a) for a in [*BASE, *paths, *extra]]


def records(save_dir, event):
    lines = (save_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


def weights(save_dir):
    return models.load_weights(save_dir / "model_state.pdparams")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.fixture(scope="module")
def finished(small_data, tiny_model, tmp_path_factory):
    """An undisturbed run that others are compared with."""
    save_dir = tmp_path_factory.mktemp("run") / "checkpoint"
    train.main(argv(small_data, tiny_model, save_dir, "--warmup", "--warmup_steps", "2"))
    return save_dir


def start(args, cwd, launch=(), cores=None):
    """train.py in a process of its own, on some cores; `launch`: of paddle.distributed.launch."""
    command = [sys.executable]
    if launch:
        command += ["-m", "paddle.distributed.launch", *launch]
    command += [str(REPO / "train.py"), *args]

    def prepare():
        os.sched_setaffinity(0, cores or os.sched_getaffinity(0))

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, preexec_fn=prepare, **pipes)


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)


def kill_once_it_has_a_state(args, save_dir, seconds=0):
    """Leaves a stopped run in save_dir."""
    process = start(args, save_dir.parent)
    wait_for(save_dir / train.STATE_FILE, process)
    time.sleep(seconds)
    process.kill()
    process.wait()


# ------------------------------------------------------------------------------ a finished run
@pytest.mark.core
def test_files_and_content_of_the_checkpoint(finished, small_data):
    assert {p.name for p in finished.iterdir()} == {
        "config.json",
        "model_state.pdparams",
        "tokenizer_config.json",
        "vocab.txt",
        "train_log.jsonl",
        "train_curves.png",
    }
    info = utils.read_model_info(finished)
    assert info.labels == utils.read_labels(small_data / "label.txt")
    assert (info.max_seq_length, info.thresholds) == (128, None)
    assert (finished / "train_curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.core
def test_log_has_one_object_per_step_and_evaluation(finished):
    steps = records(finished, "train")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]  # 96 texts, batch 32, 2 epochs
    assert {"epoch", "loss", "lr", "micro_f1", "macro_f1"} <= steps[0].keys()
    assert [r["step"] for r in records(finished, "eval")] == [3, 6]


def test_best_model_is_saved_while_macro_f1_is_0(small_data, tiny_model, tmp_path, monkeypatch):
    """Nothing reaches a threshold of 0.99 after a few steps; the lower dev loss decides then."""
    monkeypatch.setattr(train.metric, "DEFAULT_THRESHOLD", 0.99)
    train.main(argv(small_data, tiny_model, tmp_path))
    evals = records(tmp_path, "eval")
    assert [r["macro_f1"] for r in evals] == [0, 0]
    assert records(tmp_path, "end")[0]["loss"] == min(r["loss"] for r in evals)
    assert weights(tmp_path)


@pytest.mark.core
def test_paddlenlp_loads_the_checkpoint(finished):
    model = models.transformers.AutoModelForSequenceClassification.from_pretrained(str(finished))
    assert list(model.config.id2label.values()) == utils.read_model_info(finished).labels
    saved = weights(finished)
    assert all(np.array_equal(v.numpy(), saved[k]) for k, v in model.state_dict().items())
    assert models.transformers.AutoTokenizer.from_pretrained(str(finished)).vocab_size > 100


def test_log_lines_are_those_of_the_original(small_data, tiny_model, tmp_path, run_cli):
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path, "--epochs", "1"))
    assert status == 0
    for pattern in (
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[    INFO\] - global step 1, epoch: 1, "
        r"batch: 1, loss: \d\.\d{5}, micro f1 score: \d\.\d{5}, macro f1 score: \d\.\d{5}, "
        r"speed: \d+\.\d\d step/s",
        r"eval loss: \d\.\d{5}, micro f1 score: \d\.\d{5}, macro f1 score: \d\.\d{5}",
        r"Current best macro f1 score: \d\.\d{5}",
        r"Final best macro f1 score: \d\.\d{5}",
        rf"Save best macro f1 text classification model in {tmp_path}",
    ):
        assert re.search(pattern, err), pattern


def test_weights_do_not_depend_on_what_the_process_ran_before(
    finished, checkpoint, small_data, tiny_model, tmp_path
):
    """Paddle's static predictor leaves one thread behind; that would change the last bits."""
    flags = ["--dataset_dir", small_data, "--params_path", checkpoint, "--device", "cpu"]
    predict.main([str(a) for a in [*flags, "--output_file", tmp_path / "output.txt"]])
    train.main(argv(small_data, tiny_model, tmp_path / "a", "--warmup", "--warmup_steps", "2"))
    assert same_weights(finished, tmp_path / "a")


@pytest.mark.core
def test_same_command_same_weights_and_seed_matters(finished, small_data, tiny_model, tmp_path):
    flags = ("--warmup", "--warmup_steps", "2")
    train.main(argv(small_data, tiny_model, tmp_path / "a", *flags))
    train.main(argv(small_data, tiny_model, tmp_path / "b", *flags, "--seed", "4"))
    assert same_weights(finished, tmp_path / "a")
    assert not same_weights(finished, tmp_path / "b")


@pytest.mark.parametrize(
    "extra",
    [
        ["--batching", "random"],
        ["--gradient_accumulation_steps", "2", "--max_grad_norm", "1.0"],
        ["--weight_decay", "0.1", "--dropout", "0.0"],
    ],
)
def test_options_change_the_weights(finished, small_data, tiny_model, tmp_path, extra):
    train.main(argv(small_data, tiny_model, tmp_path, "--warmup", "--warmup_steps", "2", *extra))
    assert not same_weights(finished, tmp_path)


@pytest.mark.core
def test_accumulation_equals_the_large_batch(small_data, tiny_model, tmp_path):
    """Without dropout two batches of 16 give the gradient of one of 32 (96 texts: 3 steps)."""
    flags = ["--dropout", "0.0", "--epochs", "1", "--learning_rate", "1e-2"]
    train.main(argv(small_data, tiny_model, tmp_path / "a", *flags))
    flags += ["--batch_size", "16", "--gradient_accumulation_steps", "2"]
    train.main(argv(small_data, tiny_model, tmp_path / "b", *flags))
    assert len(records(tmp_path / "a", "train")) == len(records(tmp_path / "b", "train")) == 3


def test_gradients_are_exchanged_once_a_step(small_data, tiny_model, tmp_path, monkeypatch):
    """Of several batches of a step the ranks exchange the sum, not each batch's gradients."""
    calls, average_gradients = [], models.average_gradients

    def watched(parameters):
        calls.append([p.name for p in parameters if p.grad is None])
        average_gradients(parameters)

    monkeypatch.setattr(models, "average_gradients", watched)
    flags = ["--epochs", "1", "--gradient_accumulation_steps", "3"]
    train.main(argv(small_data, tiny_model, tmp_path, *flags))
    assert calls == [[]]  # 96 texts in 3 batches


def test_early_stop(small_data, tiny_model, tmp_path, run_cli):
    """A learning rate of 0 never improves after the first evaluation."""
    extra = ["--learning_rate", "0", "--epochs", "9", "--early_stop", "--early_stop_nums", "2"]
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path, *extra))
    assert status == 0 and "Early stop!" in err
    assert len(records(tmp_path, "eval")) == 3


def test_dropout_rate_of_one(small_data, tiny_model, tmp_path, run_cli):
    flags = argv(small_data, tiny_model, tmp_path / "save", "--dropout", "1.0")
    status, error = run_cli(train.main, flags)
    assert status == 2 and error == "error: --dropout 1.0: a rate is at least 0 and below 1\n"
    assert not (tmp_path / "save").exists()


def test_dropout_flag_is_kept_in_the_config(small_data, tiny_model, tmp_path):
    train.main(argv(small_data, tiny_model, tmp_path, "--epochs", "1", "--dropout", "0.3"))
    assert utils.read_json(tmp_path / "config.json")["hidden_dropout_prob"] == 0.3


def test_truncated_texts_are_counted_once(small_data, tiny_model, tmp_path, run_cli):
    extra = ["--max_seq_length", "16", "--epochs", "1"]
    _, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path, *extra))
    assert err.count("are longer than max_seq_length 16") == 1
    assert utils.read_model_info(tmp_path).max_seq_length == 16


def test_visualdl_scalars(small_data, tiny_model, tmp_path):
    logs = tmp_path / "vdl"
    extra = ["--visualdl_dir", logs, "--epochs", "1"]
    train.main(argv(small_data, tiny_model, tmp_path / "c", *extra))
    assert any(p.stat().st_size > 0 for p in logs.iterdir())


@pytest.mark.core
def test_init_from_ckpt(finished, small_data, tiny_model, tmp_path):
    """With a learning rate of 0 the loaded weights come out unchanged."""
    start_weights = finished / "model_state.pdparams"
    extra = ["--init_from_ckpt", start_weights, "--learning_rate", "0", "--epochs", "1"]
    train.main(argv(small_data, tiny_model, tmp_path, *extra))
    assert same_weights(finished, tmp_path)


# ---------------------------------------------------------------- weights and the names of labels
FROZEN = ["--learning_rate", "0", "--epochs", "1"]
ORDER = [7, *range(7), *reversed(range(8, 20))]  # of the labels, unlike that of the checkpoint


def data_with_labels(small_data, folder, labels):
    """The data with another label file; texts that have other labels are left out."""
    folder.mkdir()
    for name in ("train.txt", "dev.txt"):
        lines = (small_data / name).read_text(encoding="utf-8").splitlines()
        fitting = [x for x in lines if {*filter(None, x.split("\t")[1].split(","))} <= {*labels}]
        (folder / name).write_text("\n".join(fitting) + "\n", encoding="utf-8")
    (folder / "label.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    return folder


def start_from(kind, checkpoint, tiny_model):
    """(--model_name, further flags) for a training from the checkpoint."""
    if kind == "--model_name":
        return checkpoint, FROZEN
    return tiny_model, [kind, checkpoint / utils.WEIGHTS_FILE, *FROZEN]


@pytest.mark.parametrize("kind", ["--init_from_ckpt", "--model_name"])
def test_labels_in_another_order(finished, small_data, tiny_model, tmp_path, run_cli, kind):
    """What comes out is the model that it was, with the columns in the new order."""
    names = utils.read_labels(small_data / "label.txt")
    data = data_with_labels(small_data, tmp_path / "data", [names[i] for i in ORDER])
    name, flags = start_from(kind, finished, tiny_model)
    status, err = run_cli(train.main, argv(data, name, tmp_path / "c", *flags))
    weights_file = finished / utils.WEIGHTS_FILE
    line = "the same 20 labels in another order; the classifier takes the label file's\n"
    assert status == 0 and err.count(f"[    INFO] - {weights_file}: {line}") == 1
    train.main(argv(small_data, name, tmp_path / "same", *flags))
    old, new = weights(finished), weights(tmp_path / "c")
    for key in old:
        columns = old[key][..., ORDER] if key.startswith("classifier.") else old[key]
        assert np.array_equal(new[key], columns), key
    assert utils.read_model_info(tmp_path / "c").labels == [names[i] for i in ORDER]
    found, expected = (records(tmp_path / x, "eval")[0] for x in ("c", "same"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_other_labels(finished, small_data, tiny_model, tmp_path, run_cli):
    """Refused with --init_from_ckpt; what its message advises keeps what both have."""
    names = utils.read_labels(small_data / "label.txt")
    labels = [*names[1:3], "新标签", names[0], *names[3:18]]
    data = data_with_labels(small_data, tmp_path / "data", labels)
    name, flags = start_from("--init_from_ckpt", finished, tiny_model)
    use = "use the label file that it was trained with"
    keep = "which keeps the weights of the labels that both have\n"
    lacks = f"{data / 'label.txt'}:3: label '新标签' is not among the 20 labels of"
    for save_dir, also in ((tmp_path / "c", ""), (finished, " and another --save_dir")):
        status, err = run_cli(train.main, argv(data, name, save_dir, *flags))
        instead = f"or --model_name {finished} instead of --init_from_ckpt{also}"
        message = f"error: {lacks} {finished / 'config.json'}; {use}, {instead}, {keep}"
        assert status == 2 and err.endswith(message)
    assert not (tmp_path / "c").exists()
    status, err = run_cli(train.main, argv(data, finished, tmp_path / "c", *FROZEN))
    knows = f"{finished / utils.WEIGHTS_FILE}: the classifier knows 18 of the 19 labels; 1 start(s)"
    unused = f"2 of its own not in the label file: {names[18]}, {names[19]}"
    assert status == 0 and err.count(f"[ WARNING] - {knows} anew: 新标签; {unused}\n") == 1
    for key in ("classifier.weight", "classifier.bias"):
        old, new = weights(finished)[key], weights(tmp_path / "c")[key]
        assert new.shape[-1] == 19 and np.isfinite(new).all()
        assert np.array_equal(
            new[..., [0, 1, 3, *range(4, 19)]], old[..., [1, 2, 0, *range(3, 18)]]
        )


def test_fewer_labels(finished, small_data, tiny_model, tmp_path, run_cli):
    names = utils.read_labels(small_data / "label.txt")
    data = data_with_labels(small_data, tmp_path / "data", names[:-1])
    (tmp_path / "renamed").mkdir()
    shutil.copy(finished / utils.WEIGHTS_FILE, tmp_path / "renamed" / "best.pdparams")
    shutil.copy(finished / utils.CONFIG_FILE, tmp_path / "renamed")
    flags = ["--init_from_ckpt", tmp_path / "renamed" / "best.pdparams", *FROZEN]
    status, err = run_cli(train.main, argv(data, tiny_model, tmp_path / "c", *flags))
    missing = f"label '{names[-1]}' of {tmp_path / 'renamed' / 'config.json'} is missing"
    message = f"{data / 'label.txt'}: {missing}; use the label file that it was trained with\n"
    assert status == 2 and err.endswith(f"error: {message}")


def test_a_long_list_of_new_labels_is_cut(finished, small_data, tmp_path, run_cli):
    names = utils.read_labels(small_data / "label.txt")
    new = [f"新{i}" for i in range(7)]
    data = data_with_labels(small_data, tmp_path / "data", [*names, *new])
    status, err = run_cli(train.main, argv(data, finished, tmp_path / "c", *FROZEN))
    line = (
        "the classifier knows 20 of the 27 labels; 7 start(s) anew: 新0, 新1, 新2, 新3, 新4, ...\n"
    )
    assert status == 0 and line in err


@pytest.mark.parametrize(
    "beside", [None, {}, {"id2label": {str(i): f"LABEL_{i}" for i in range(20)}}]
)
def test_weights_without_label_names(finished, small_data, tiny_model, tmp_path, run_cli, beside):
    file = tmp_path / "old" / "model_state.pdparams"
    file.parent.mkdir()
    shutil.copy(finished / utils.WEIGHTS_FILE, file)
    if beside is not None:
        (file.parent / "config.json").write_text(json.dumps(beside), encoding="utf-8")
    flags = ["--init_from_ckpt", file, *FROZEN]
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path / "c", *flags))
    line = "no config.json with label names beside it; only the number of labels can be compared\n"
    assert status == 0 and err.count(f"[ WARNING] - {file}: {line}") == 1
    assert same_weights(finished, tmp_path / "c")
    data = data_with_labels(
        small_data, tmp_path / "data", utils.read_labels(small_data / "label.txt")[:9]
    )
    status, err = run_cli(train.main, argv(data, tiny_model, tmp_path / "d", *flags))
    assert status == 2 and "parameter classifier.weight has shape (128, 20), the model needs" in err


def test_thresholds_follow_their_labels(finished, small_data, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "tuned")
    tuned = [i / 20 for i in range(20)]
    config = {**utils.read_json(folder / "config.json"), "thresholds": tuned, "max_labels": 3}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = utils.read_labels(small_data / "label.txt")
    net, info = models.load_checkpoint(folder, [names[i] for i in ORDER])
    assert info.labels == [names[i] for i in ORDER] and info.max_labels == 3
    assert info.thresholds == [tuned[i] for i in ORDER]
    batch = {k: np.ones((2, 5), np.int64) for k in ("input_ids", "token_type_ids")}
    logits, expected = (
        models.dygraph_forward(x)(**batch) for x in (net, models.load_checkpoint(folder)[0])
    )
    np.testing.assert_allclose(logits, expected[:, ORDER], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- resume
@pytest.mark.core
def test_resume_after_sigkill_is_exact(small_data, tiny_model, tmp_path):
    flags = ["--warmup", "--epochs", "3", "--save_steps", "2", "--weight_decay", "0.01"]
    flags += ["--early_stop", "--gradient_accumulation_steps", "2", "--batch_size", "8"]
    train.main(argv(small_data, tiny_model, tmp_path / "whole", *flags))
    args = argv(small_data, tiny_model, tmp_path / "killed", *flags)
    kill_once_it_has_a_state(args, tmp_path / "killed", seconds=0.3)
    train.main([*args, "--resume"])
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    log = "train_log.jsonl"
    assert (tmp_path / "whole" / log).read_text() == (tmp_path / "killed" / log).read_text()
    assert not list((tmp_path / "killed").glob(".*")), "temporary files were left"


@pytest.mark.core
def test_resume_faults(small_data, tiny_model, tmp_path, run_cli):
    args = argv(small_data, tiny_model, tmp_path / "c", "--save_steps", "1", "--epochs", "3")
    kill_once_it_has_a_state(args, tmp_path / "c")
    state = (tmp_path / "c" / train.STATE_FILE).read_bytes()
    for extra, message in (
        ([], "a stopped run; add --resume"),
        (["--resume", "--batch_size", "16"], "batch_size changed since the run was stopped"),
    ):
        status, err = run_cli(train.main, [*args, *extra])
        assert (status, message in err) == (2, True), err
    (tmp_path / "c" / train.STATE_FILE).write_bytes(state[: len(state) // 2])
    status, err = run_cli(train.main, [*args, "--resume"])
    assert status == 2 and "broken weights file" in err and "Traceback" not in err


def test_resume_of_a_finished_run_does_nothing(finished, small_data, tiny_model, run_cli):
    before = (finished / "model_state.pdparams").stat().st_mtime_ns
    args = argv(small_data, tiny_model, finished, "--warmup", "--warmup_steps", "2", "--resume")
    status, err = run_cli(train.main, args)
    assert status == 0 and "nothing to resume" in err
    assert (finished / "model_state.pdparams").stat().st_mtime_ns == before


def test_resume_of_a_finished_run_with_other_flags(finished, small_data, tiny_model, run_cli):
    args = argv(small_data, tiny_model, finished, "--warmup", "--warmup_steps", "2", "--resume")
    status, err = run_cli(train.main, [*args, "--epochs", "5"])
    assert status == 2 and "epochs changed since the run was finished" in err


def test_resume_after_the_model_folder_moved(small_data, tiny_model, tmp_path, monkeypatch):
    """The folder may move or be spelled otherwise after the start."""
    flags = ["--epochs", "2"]
    train.main(argv(small_data, tiny_model, tmp_path / "whole", *flags))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    with monkeypatch.context() as patch:

        def stop_after_the_first(trainer, save=train.Trainer.save_state):
            if trainer.progress.epoch == 1:
                raise KeyboardInterrupt
            save(trainer)

        patch.setattr(train.Trainer, "save_state", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train.main(argv(small_data, model, tmp_path / "stopped", *flags))
    model.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    train.main([*argv(small_data, "./moved", tmp_path / "stopped", *flags), "--resume"])
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_resume_with_another_model_is_refused(small_data, tiny_model, tmp_path, run_cli):
    """Its architecture, vocabulary or weights differ; the state alone would not show it."""
    args = argv(small_data, tiny_model, tmp_path / "c", "--save_steps", "1", "--epochs", "3")
    kill_once_it_has_a_state(args, tmp_path / "c")
    for name in ("vocab.txt", "config.json", utils.WEIGHTS_FILE):
        other = shutil.copytree(tiny_model, tmp_path / name.replace(".", "_"))
        if name == "vocab.txt":
            tokens = (other / name).read_text(encoding="utf-8").split("\n")
            tokens[10], tokens[11] = tokens[11], tokens[10]
            (other / name).write_text("\n".join(tokens), encoding="utf-8")
        elif name == utils.WEIGHTS_FILE:
            halves = {k: v / 2 for k, v in models.load_weights(other / name).items()}
            with open(other / name, "wb") as file:
                models.save_weights(file, halves)
        else:
            config = {**utils.read_json(other / name), "hidden_act": "relu"}
            (other / name).write_text(json.dumps(config), encoding="utf-8")
        status, err = run_cli(train.main, [*argv(small_data, other, tmp_path / "c"), "--resume"])
        what = "train_file, dev_file" if name == "vocab.txt" else "model_name"
        assert status == 2 and f"{what} changed since the run was stopped" in err, err


def test_resume_of_a_stopped_run_with_a_damaged_log(small_data, tiny_model, tmp_path, run_cli):
    """Its state is whole, so the run goes on; the curves lack what cannot be read."""
    args = argv(small_data, tiny_model, tmp_path / "c", "--save_steps", "1", "--epochs", "3")
    kill_once_it_has_a_state(args, tmp_path / "c")
    log = tmp_path / "c" / train.LOG_FILE
    log.write_bytes(b"x" + log.read_bytes()[1:])
    status, err = run_cli(train.main, [*args, "--resume"])
    assert status == 0 and f"{log}:1: damaged line; the curves are without it" in err
    assert (tmp_path / "c" / "train_curves.png").exists()


def test_resume_with_a_damaged_log(finished, small_data, tiny_model, tmp_path, run_cli):
    folder = shutil.copytree(finished, tmp_path / "c")
    log = folder / train.LOG_FILE
    lines = log.read_bytes().split(b"\n")
    args = argv(small_data, tiny_model, folder, "--warmup", "--warmup_steps", "2", "--resume")
    for damaged in (b'{"event": "start", "st', b"\xff", b"[]", b'{"flags": 3}'):
        log.write_bytes(b"\n".join([damaged, *lines[1:]]))
        status, err = run_cli(train.main, args)
        last = err.splitlines()[-1]
        assert status == 2 and f"{log}:1: damaged line; train in another --save_dir" in last
        assert "Traceback" not in err


def test_diverged_run_is_an_error(small_data, tiny_model, tmp_path, run_cli):
    extra = ["--learning_rate", "1e30"]
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path / "c", *extra))
    assert status == 2 and "dev loss is nan after epoch 1: lower --learning_rate" in err
    assert not (tmp_path / "c" / "model_state.pdparams").exists()


def test_ctrl_c(small_data, tiny_model, tmp_path):
    args = argv(small_data, tiny_model, tmp_path / "c", "--save_steps", "1", "--epochs", "50")
    process = start(args, tmp_path)
    wait_for(tmp_path / "c" / train.STATE_FILE, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out and "error: interrupted" in out.splitlines()[-1]
    assert not list((tmp_path / "c").glob(".*"))


# ---------------------------------------------------------------------------- several processes
LAUNCH = ["--nproc_per_node=2", "--backend=gloo", "--log_dir=log"]


@pytest.mark.core
def test_two_processes_report_the_dev_figures_of_one(finished, small_data, tiny_model, tmp_path):
    """Learning rate 0 on given weights: what is left is the evaluation.

    How many threads share a matrix product shows in the last bits; half of the cores for one
    process gives it as many as each of the two.
    """
    extra = ["--init_from_ckpt", finished / "model_state.pdparams", "--learning_rate", "0"]
    extra += ["--batch_size", "8", "--epochs", "1"]
    cores = sorted(os.sched_getaffinity(0))
    half = cores[: max(1, len(cores) // 2)]
    for process in (
        start(argv(small_data, tiny_model, tmp_path / "one", *extra), tmp_path, cores=half),
        start(argv(small_data, tiny_model, tmp_path / "two", *extra), tmp_path, LAUNCH),
    ):
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
    one, two = (records(tmp_path / name, "eval")[0] for name in ("one", "two"))
    assert one["loss"] > 0 and (one.pop("step"), two.pop("step")) == (12, 6)
    assert one == two
    assert same_weights(tmp_path / "one", tmp_path / "two")


def children(pid):
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_two_machines_lost_worker_and_resume(small_data, tiny_model, tmp_path):
    """Two launches as two nodes on loopback, each with its own disk; one worker is killed."""
    flags = ["--epochs", "3", "--batch_size", "8", "--save_steps", "2", "--warmup"]
    args = argv(small_data, tiny_model, "checkpoint", *flags)

    def nodes(name, port, *extra):
        processes = []
        for rank in (0, 1):
            folder = tmp_path / name / str(rank)
            folder.mkdir(parents=True, exist_ok=True)
            launch = ["--nnodes=2", "--nproc_per_node=1", "--backend=gloo", "--log_dir=log"]
            launch += [f"--master=127.0.0.1:{port}", f"--rank={rank}"]
            processes.append(start([*args, *extra], folder, launch))
        return processes

    for process in (whole := nodes("whole", free_port())):
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
    assert len(whole) == 2
    first, second = nodes("lost", free_port())
    wait_for(tmp_path / "lost" / "0" / "checkpoint" / train.STATE_FILE, first)
    os.kill(children(second.pid)[0], signal.SIGKILL)
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert first.returncode != 0 and second.returncode != 0
    assert "Traceback" not in outputs[1], outputs[1]
    for process in nodes("lost", free_port(), "--resume"):
        out, _ = process.communicate(timeout=180)
        assert process.returncode == 0, out
    saved = [tmp_path / name / "0" / "checkpoint" for name in ("whole", "lost")]
    assert same_weights(*saved)


# ------------------------------------------------------------------------------- one run at a time
def running(flag, folder, pid, run="training"):
    message = f"{flag} {folder}: a {run} is running here (process {pid})"
    return f"error: {message}; wait until it ends, or give another folder\n"


def test_a_running_training_is_not_taken_for_a_stopped_one(
    small_data, tiny_model, tmp_path, run_cli
):
    """Not even with --resume; once it is killed, --resume goes on and leaves no lock."""
    args = argv(small_data, tiny_model, tmp_path / "c", "--save_steps", "1")
    process = start(args, tmp_path)
    wait_for(tmp_path / "c" / train.STATE_FILE, process)
    process.send_signal(signal.SIGSTOP)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "c").iterdir())
    for extra in ([], ["--resume"]):
        status, err = run_cli(train.main, [*args, *extra])
        assert (status, err) == (2, running("--save_dir", tmp_path / "c", process.pid))
    after = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "c").iterdir())
    assert after == before
    process.kill()
    process.wait()
    assert (tmp_path / "c" / f"{utils.RUN_FILE}.lock").exists()
    assert "a stopped run; add --resume" in run_cli(train.main, args)[1]
    train.main([*args, "--resume"])
    train.main(argv(small_data, tiny_model, tmp_path / "whole", "--save_steps", "1"))
    assert same_weights(tmp_path / "c", tmp_path / "whole")
    assert not list((tmp_path / "c").glob(".*"))


def test_all_ranks_stop_where_a_training_is_running(small_data, tiny_model, tmp_path):
    save_dir = tmp_path / "c"
    with utils.run_lock("--save_dir", save_dir, "training"):
        process = start(argv(small_data, tiny_model, save_dir), tmp_path, LAUNCH)
        out, _ = process.communicate(timeout=120)
    message = running("--save_dir", save_dir, os.getpid())
    assert process.returncode != 0 and message in out and "Traceback" not in out
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text("utf-8") for rank in (0, 1)]
    assert all(log.endswith(message) for log in logs), logs
    assert not save_dir.exists()


def test_a_training_locks_its_scalars_too(small_data, tiny_model, tmp_path, run_cli):
    args = argv(small_data, tiny_model, tmp_path / "c", "--epochs", "1")
    with utils.run_lock("--visualdl_dir", tmp_path / "vdl", "training"):
        status, err = run_cli(train.main, [*args, "--visualdl_dir", tmp_path / "vdl"])
    assert (status, err) == (2, running("--visualdl_dir", tmp_path / "vdl", os.getpid()))
    assert os.listdir(tmp_path) == []
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert run_cli(train.main, [*args, "--visualdl_dir", tmp_path / "link"])[0] == 0
    assert not list((tmp_path / "c").glob(".*"))


def test_the_folds_of_dirty_are_locked_together(
    small_data, tiny_model, tmp_path, run_cli, monkeypatch
):
    import dirty

    data, folds = shutil.copytree(small_data, tmp_path / "data"), tmp_path / "folds"
    args = ["--dataset_dir", data, "--strategy", "finetune", "--folds_dir", folds, "--device"]
    args += ["cpu", "--folds", "2", "--dirty_num", "5", "--train_args"]
    args += [f"--model_name {tiny_model} --epochs 1"]
    message = running("--folds_dir", folds, os.getpid())
    with utils.run_lock("--folds_dir", folds, "training"):
        assert run_cli(dirty.main, args) == (2, message) and len(os.listdir(folds)) == 2
    assert not folds.exists()

    def second(*_):  # while the first fold trains
        assert run_cli(dirty.main, args) == (2, message)
        raise utils.UserError("done")

    monkeypatch.setattr(dirty, "run_train", second)
    assert run_cli(dirty.main, args) == (2, "error: done\n")
    assert os.listdir(folds) == ["0"]


# -------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize(
    "extra, message",
    [
        (["--device", "gpu"], "--device gpu: this PaddlePaddle cannot use it"),
        (["--warmup_steps", "10"], "--warmup_steps needs --warmup"),
        (["--amp"], "--amp needs a GPU"),
        (["--model_name", "no/such"], "--model_name no/such: neither a folder nor one of"),
        (["--max_seq_length", "161"], "--max_seq_length 161: this model takes 3 to 160"),
        (["--dataset_dir", "no/such"], "no/such/label.txt: No such file or directory"),
        (["--train_file", "none.txt"], "none.txt: No such file or directory"),
        (["--init_from_ckpt", "none.pdparams"], "none.pdparams: No such file or directory"),
        (["--batch_size", "0"], "0 is not a number of at least 1"),
        (["--epochs", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_flags(small_data, tiny_model, tmp_path, run_cli, extra, message):
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path / "c", *extra))
    assert status == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "c").exists()


@pytest.mark.core
def test_name_without_network(small_data, tmp_path, run_cli, monkeypatch):
    """PaddleNLP is told that nothing can be reached, as on a machine without network."""

    def fail(*args, **kwargs):
        raise OSError("Can't load the model")

    monkeypatch.setattr(
        models.transformers.AutoModelForSequenceClassification, "from_pretrained", fail
    )
    args = argv(small_data, "ernie-3.0-nano-zh", tmp_path / "c")
    status, err = run_cli(train.main, args)
    assert status == 2
    assert "cannot be downloaded (OSError); without network give a local folder" in err


def test_init_from_ckpt_of_another_shape(checkpoint, small_data, tmp_path, run_cli):
    import init_model

    other = tmp_path / "other"
    init_model.main(["--output_dir", str(other), "--dataset_dir", str(SAMPLE), "--shape", "small"])
    extra = ["--init_from_ckpt", checkpoint / "model_state.pdparams"]
    status, err = run_cli(train.main, argv(small_data, other, tmp_path / "c", *extra))
    assert status == 2 and "has shape" in err and "the model needs" in err


def test_bad_lines_are_listed_and_nothing_is_overwritten(
    finished, small_data, tiny_model, tmp_path, run_cli
):
    before = (finished / "model_state.pdparams").read_bytes()
    data = tmp_path / "data"
    data.mkdir()
    for path in small_data.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "train.txt").write_text("一\t婚后有子女\n二\n三\t没有\n", encoding="utf-8")
    status, err = run_cli(train.main, argv(data, tiny_model, finished))
    lines = err[err.index("error:") :].strip().splitlines()
    assert status == 2 and len(lines) == 2
    assert "train.txt:2: no tab" in lines[0] and "train.txt:3: unknown label '没有'" in lines[1]
    assert (finished / "model_state.pdparams").read_bytes() == before


def test_a_finished_run_is_replaced_with_a_warning(small_data, tiny_model, tmp_path, run_cli):
    args = argv(small_data, tiny_model, tmp_path / "c", "--epochs", "1")
    train.main(args)
    status, err = run_cli(train.main, args)
    assert status == 0 and "holds a finished run, which this one will replace" in err


@pytest.mark.parametrize("spelling", ["model", "./model/", "link"])
def test_pretrained_weights_are_never_replaced(
    tiny_model, small_data, tmp_path, run_cli, monkeypatch, spelling
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    status, err = run_cli(train.main, argv(small_data, model, spelling))
    assert status == 2 and f"--save_dir {spelling} is the --model_name folder" in err
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}


def test_training_set_from_a_pipe(finished, small_data, tiny_model, tmp_path):
    """No input is read twice."""
    args = argv(small_data, tiny_model, tmp_path / "c", "--warmup", "--warmup_steps", "2")
    command = [sys.executable, str(REPO / "train.py"), *args, "--train_file", "/dev/stdin"]
    text = (small_data / "train.txt").read_bytes()
    subprocess.run(command, input=text, check=True, capture_output=True)
    assert same_weights(finished, tmp_path / "c")


def test_full_disk_keeps_the_old_model(finished, small_data, tiny_model, run_cli):
    """A limit on file size stands for the full disk: the model is larger than what is allowed."""
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.name != "train_log.jsonl"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status, err = run_cli(train.main, argv(small_data, tiny_model, finished))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "cannot write" in err and "nothing was replaced" in err
    after = {p.name: p.read_bytes() for p in finished.iterdir() if p.name != "train_log.jsonl"}
    assert before == after


def test_paddle_is_the_cpu_build():
    """The tests of --device gpu rely on it."""
    assert not paddle.is_compiled_with_cuda()


@pytest.mark.parametrize(
    "flags, first, second",
    [
        (
            [],
            "2 epoch(s), 24 steps; try more --epochs, a higher --learning_rate than 1e-09 (random "
            "weights need about 0.001), --warmup --warmup_steps 2",
            "Rare labels: --loss asl --pos_weight auto. Only too cautious:",
        ),
        (
            "--early_stop --early_stop_nums 1 --epochs 5 --warmup --warmup_steps 1 --loss asl "
            "--metric_for_best micro_f1 --learning_rate 0".split(),
            "2 epoch(s), 24 steps; try a higher --early_stop_nums than 1, a higher --learning_rate "
            "than 0 (random weights need about 0.001)",
            "Rare labels: --pos_weight auto. Only too cautious:",
        ),
        (
            "--learning_rate 0.5 --epochs 1 --warmup --loss asl --pos_weight auto".split(),
            "1 epoch(s), 12 steps; try more --epochs, a lower --learning_rate than 0.5, "
            "--max_grad_norm 1",
            "- Only too cautious:",
        ),
    ],
)
def test_remedies_for_a_model_that_finds_nothing(
    small_data, tiny_model, tmp_path, run_cli, monkeypatch, flags, first, second
):
    def nothing(*args):
        return {"loss": 1.0, "micro_f1": 0.0, "macro_f1": 0.0}

    monkeypatch.setattr(models, "evaluate", nothing)
    extra = ["--batch_size", "8", "--learning_rate", "1e-9", *flags]
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path / "c", *extra))
    *_, cause, rest = err.splitlines()
    assert status == 0 and "[ WARNING] - F1 is 0: no dev text got a right label after " in cause
    assert cause.endswith(first) and second in rest and "[ WARNING] - " in rest
    assert rest.endswith(" analysis/evaluate.py --tune_thresholds --save_thresholds")


def test_a_dev_set_without_labels(small_data, tiny_model, tmp_path, run_cli):
    texts = [line.split("\t")[0] for line in (small_data / "dev.txt").open(encoding="utf-8")]
    (tmp_path / "dev.txt").write_text("".join(f"{t}\t\n" for t in texts), encoding="utf-8")
    extra = ["--epochs", "1", "--dev_file", tmp_path / "dev.txt"]
    status, err = run_cli(train.main, argv(small_data, tiny_model, tmp_path / "c", *extra))
    *_, cause, rest = err.splitlines()
    assert status == 0 and cause.endswith(f"no sample of {tmp_path / 'dev.txt'} has a label")
    assert rest.endswith("Give a --dev_file with labels; data/check.py counts them")


def test_no_remedies_for_a_model_that_finds_something(finished, small_data, tiny_model, run_cli):
    status, err = run_cli(
        train.main,
        argv(
            small_data,
            tiny_model,
            finished.parent / "again",
            "--learning_rate",
            "5e-3",
            "--epochs",
            "3",
        ),
    )
    last = records(finished.parent / "again", "end")[0]
    assert status == 0 and last["micro_f1"] > 0 and "F1 is 0" not in err


@pytest.mark.core
def test_reaches_the_floor_on_the_sample(checkpoint):
    best = records(checkpoint, "end")[-1]
    assert best["micro_f1"] >= 0.90
    assert best["macro_f1"] == max(r["macro_f1"] for r in records(checkpoint, "eval"))
