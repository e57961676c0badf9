"""What lies on disk: the sample data, the initial model, model folders, weights; atomic writing."""

import errno
import json
import os
import pickle
import resource
import shutil
import stat
import subprocess
import sys

import init_model
import make_sample
import numpy as np
import pytest
from conftest import REPO, SAMPLE

import model as models
import utils
from utils import UserError

FILES = ("train.txt", "dev.txt", "data.txt", "label.txt")


# ------------------------------------------------------------------------------------ the sample
def test_the_committed_sample_is_what_the_generator_writes(tmp_path):
    make_sample.main(["--output_dir", str(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


def test_the_seed_alone_decides(tmp_path):
    small = ["--num_train", "60", "--num_dev", "20", "--num_data", "5", "--output_dir"]
    for name, flags in (("a", []), ("b", []), ("c", ["--seed", "4"])):
        make_sample.main([*small, str(tmp_path / name), *flags])
    content = {name: (tmp_path / name / "train.txt").read_text("utf-8") for name in "abc"}
    assert content["a"] == content["b"] != content["c"]
    assert [len(list(utils.read_texts(tmp_path / "a" / f))) for f in FILES] == [60, 20, 5, 20]


def test_the_sample_is_realistic():
    labels = utils.read_labels(SAMPLE / "label.txt")
    assert labels == list(make_sample.LABELS) and len(labels) == 20
    train, train_ids = utils.read_examples(SAMPLE / "train.txt", labels)
    dev, dev_ids = utils.read_examples(SAMPLE / "dev.txt", labels)
    data = list(utils.read_texts(SAMPLE / "data.txt"))
    assert (len(train), len(dev), len(data)) == (2000, 400, 40)
    assert len({*train, *dev, *data}) == 2440  # no duplicates, and no dev text was trained on
    for ids, rarest in ((train_ids, 20), (dev_ids, 5)):
        per_label = utils.multi_hot(ids, 20).sum(0)
        assert per_label.min() >= rarest and per_label.max() > 20 * per_label.min()  # imbalance
        per_text = [len(i) for i in ids]
        assert 1.5 < np.mean(per_text) < 2.2 and {0, 1, 2, 3} <= set(per_text)
    lengths = [len(text) for text in train]
    assert 35 < np.median(lengths) < 60 and 0 < np.mean(np.array(lengths) > 126) < 0.1


def test_the_sample_is_not_copied_from_the_real_set(shared):
    real = {
        text
        for name in FILES[:2]
        for text in (shared / "data/divorce" / name).open(encoding="utf-8")
    }
    real = {line.split("\t")[0].strip() for line in real}
    ours = {
        line.split("\t")[0] for name in FILES[:3] for line in open(SAMPLE / name, encoding="utf-8")
    }
    assert len(real) > 15000 and not {text for text in real & ours if len(text) > 15}


# ------------------------------------------------------------------------------- the initial model
def test_initial_model_loads_in_paddlenlp_and_in_train(tiny_model, tmp_path):
    written = models.load_weights(tiny_model / utils.WEIGHTS_FILE)
    theirs = models.transformers.ErnieForSequenceClassification.from_pretrained(
        str(tiny_model), num_labels=20
    )
    ours = models.load_folder(tiny_model, list(make_sample.LABELS))
    for model in (theirs, ours):
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        assert set(state) - set(written) == {"classifier.weight", "classifier.bias"}
        assert set(written) <= set(state)
        assert all(np.array_equal(state[name], array) for name, array in written.items())
    config = utils.read_json(tiny_model / "config.json")
    vocab = list(utils.read_texts(tiny_model / "vocab.txt"))
    assert config["vocab_size"] == len(vocab) == len(set(vocab))
    assert config["max_position_embeddings"] == 160


def test_vocabulary_of_the_training_set_knows_the_dev_set(tiny_model):
    labels = utils.read_labels(SAMPLE / "label.txt")
    tokenizer = utils.load_tokenizer(tiny_model)
    texts, _ = utils.read_examples(SAMPLE / "dev.txt", labels)
    ids = np.concatenate(utils.encode(texts, tokenizer, 160)[0])
    assert np.mean(ids == tokenizer.token_to_id("[UNK]")) < 0.005


def test_given_vocabulary_shape_and_seed(tmp_path):
    vocab = [*utils.SPECIAL_TOKENS, "中", "文"]
    (tmp_path / "v.txt").write_bytes("\r\n".join(vocab).encode())
    for name, flags in (("a", []), ("b", []), ("c", ["--seed", "4"])):
        flags += ["--vocab_file", tmp_path / "v.txt", "--shape", "nano", "--max_position", "32"]
        init_model.main(
            [str(f) for f in ("--output_dir", tmp_path / name, "--dropout", 0.3, *flags)]
        )
    assert list(utils.read_texts(tmp_path / "a/vocab.txt")) == vocab
    config = utils.read_json(tmp_path / "a/config.json")
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (4, 312, 7)
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.3
    content = [(tmp_path / name / utils.WEIGHTS_FILE).read_bytes() for name in "abc"]
    assert content[0] == content[1] != content[2]


def test_the_folder_of_the_vocabulary_is_not_overwritten(tiny_model, tmp_path, run_cli):
    """It may hold a pretrained model."""
    folder = shutil.copytree(tiny_model, tmp_path / "pretrained")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for output in (folder, tmp_path / "link", folder / ".." / "pretrained"):
        argv = ["--vocab_file", folder / "vocab.txt", "--output_dir", output]
        status, error = run_cli(init_model.main, argv)
        assert status == 2 and "vocab.txt: it is an input of this command" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_vocabulary_from_a_pipe(tiny_model, tmp_path):
    """It is read once, and a line ends at a line feed alone."""
    vocab = [*utils.SPECIAL_TOKENS, *(f"词{i}" for i in range(2000)), "\u2028", "\x85", "甲\r乙"]
    reader, writer = os.pipe()
    os.write(writer, "".join(f"{token}\n" for token in vocab).encode())
    os.close(writer)
    init_model.main(["--vocab_file", f"/dev/fd/{reader}", "--output_dir", str(tmp_path / "m")])
    os.close(reader)
    assert list(utils.read_texts(tmp_path / "m" / "vocab.txt")) == vocab
    assert utils.read_json(tmp_path / "m" / "config.json")["vocab_size"] == len(vocab)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dataset_dir", SAMPLE, "--vocab_file", "vocab.txt"],
        ["--dataset_dir", "missing"],
        ["--vocab_file", "missing.txt"],
        ["--vocab_file", SAMPLE / "label.txt"],
        ["--dataset_dir", SAMPLE, "--max_position", "0"],
        ["--dataset_dir", SAMPLE, "--dropout", "-1"],
    ],
)
def test_bad_arguments_of_init_model(tmp_path, run_cli, flags):
    status, error = run_cli(init_model.main, ["--output_dir", tmp_path / "model", *flags])
    assert status == 2 and "error: " in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- model folders
LABELS = ["离婚", "财产"]
CONFIG = {
    "id2label": {"1": "财产", "0": "离婚"},
    "max_seq_length": 64,
    "max_position_embeddings": 160,
}


def test_model_info(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "thresholds": [0.5, 0.25]}))
    assert utils.read_model_info(tmp_path) == utils.ModelInfo(LABELS, 64, 160, [0.5, 0.25])
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "thresholds": None}))
    assert utils.read_model_info(str(tmp_path)).thresholds is None


@pytest.mark.parametrize(
    "change",
    [
        {"id2label": None},
        {"id2label": {"0": "离婚", "2": "财产"}},
        {"max_seq_length": None},
        {"max_position_embeddings": "many"},
        {"thresholds": [0.5]},
        {"thresholds": 0.5},
        {"thresholds": ["high", "low"]},
    ],
)
def test_broken_model_info(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match="config.json: "):
        utils.read_model_info(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model_type": "ernie"}', None])
def test_broken_model_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json: "):
        utils.read_model_info(tmp_path)
    with pytest.raises(UserError, match="none: no such folder"):
        utils.read_model_info(tmp_path / "none")


# ---------------------------------------------------------------------------------------- weights
class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, os.mkdir])
def test_weights_that_carry_code_are_refused_and_not_run(tmp_path, function):
    marker, path = tmp_path / "marker", tmp_path / "w.pdparams"
    args = {"system": f"mkdir {marker}", "eval": f"__import__('os').mkdir({str(marker)!r})"}
    evil = Call(function, args.get(function.__name__, str(marker)))
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"w": np.zeros(3), "x": [evil]}, protocol))
        with pytest.raises(UserError, match=f"w.pdparams: .*{function.__name__}"):
            models.load_weights(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it would have done harm


def test_weights_round_trip(tmp_path):
    import paddle

    rng = np.random.default_rng(0)
    weights = {"层.weight": rng.random((3, 4), np.float32), "b": np.arange(5)}
    weights["c"] = np.array(2, dtype=np.float16)
    with open(tmp_path / "w.pdparams", "wb") as file:
        models.save_weights(file, weights)
    layer = paddle.nn.Linear(3, 2)
    paddle.save(layer.state_dict(), str(tmp_path / "p.pdparams"))
    by_paddle = {name: value.numpy() for name, value in layer.state_dict().items()}
    for path, expected in (("w.pdparams", weights), ("p.pdparams", by_paddle)):
        for load in (models.load_weights, lambda p: paddle.load(str(p), return_numpy=True)):
            loaded = load(tmp_path / path)
            assert list(loaded) == list(expected)
            for name, array in expected.items():
                assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)


def test_broken_weights(tmp_path):
    path = tmp_path / "w.pdparams"
    with pytest.raises(UserError, match="w.pdparams: No such file"):
        models.load_weights(path)
    whole = pickle.dumps({"a": np.arange(1000)}, 4)
    for content in (whole[:-100], whole[:20], b"", b"\x00" * 50, pickle.dumps([np.zeros(3)])):
        path.write_bytes(content)
        with pytest.raises(UserError, match="w.pdparams: broken weights file"):
            models.load_weights(path)


# ---------------------------------------------------------------------- whole or not at all
def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def content_of(folder):
    return {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.is_file()}


def test_file_appears_when_it_is_whole(tmp_path):
    for content in ("中\r\n1\n", "2"):
        before = content_of(tmp_path).get("f.txt")
        with utils.atomic_file(tmp_path / "f.txt") as file:
            file.write(content)
            file.flush()
            assert content_of(tmp_path).get("f.txt") == before
        assert (tmp_path / "f.txt").read_bytes() == content.encode()
    assert os.listdir(tmp_path) == ["f.txt"]


@pytest.mark.parametrize("fault", ["exception", "Ctrl-C", "fsync", "file size"])
def test_old_file_stays_when_writing_fails(tmp_path, monkeypatch, fault):
    (tmp_path / "f.txt").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = {"exception": ZeroDivisionError, "Ctrl-C": KeyboardInterrupt}.get(fault, UserError)
    try:
        with pytest.raises(expected) as error, utils.atomic_file(tmp_path / "f.txt", "wb") as file:
            if fault == "fsync":
                full_disk(monkeypatch)
            elif fault == "file size":  # the kernel refuses to write more, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            file.write(bytes(10**6))
            if expected is not UserError:
                raise expected
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert expected is not UserError or "cannot write" in str(error.value)
    assert content_of(tmp_path) == {"f.txt": "old"}


def test_file_in_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="cannot write .*f.txt: no folder"):
        with utils.atomic_file(tmp_path / "none" / "f.txt"):
            pass


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that a writer need not wait
    try:
        with utils.atomic_file(pipe) as file:
            file.write("text")
    except UserError:
        pass
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def write_folder(path, **files):
    with utils.atomic_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_text(content)


OLD = {"model_state.pdparams": "old", "config.json": "c", "vocab.txt": "v"}
# What training leaves beside the model must survive the next best model.
OLD_FOLDER = {**OLD, "train_log.jsonl": "log"}


@pytest.mark.parametrize("changed", [{}, {"config.json": "d"}, {"extra.json": "e"}])
def test_replacing_a_model_folder(tmp_path, monkeypatch, changed):
    path, seen, replace = tmp_path / "a" / "model", [], os.replace
    write_folder(path, **OLD)
    assert content_of(path) == OLD
    (path / "train_log.jsonl").write_text("log")
    new = {**OLD, "model_state.pdparams": "new", **changed}

    def watched(source, target):
        seen.append(content_of(path).get("config.json"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_folder(path, **new)
    assert content_of(path) == {**OLD_FOLDER, **new} and os.listdir(path.parent) == ["model"]
    # A config must never be seen beside other weights; alone these are replaced in one step.
    assert set(seen) == ({None} if changed else {"c"})


def test_the_user_s_own_empty_folder_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, stays in (("mine", True), ("new", False)):
        with pytest.raises(ZeroDivisionError), utils.atomic_folder(tmp_path / name):
            raise ZeroDivisionError
        assert (tmp_path / name).exists() == stays
    assert os.listdir(tmp_path / "mine") == []


def test_the_user_s_own_lock_file_stays(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    write_folder(tmp_path, **OLD)
    assert content_of(tmp_path) == {".lock": "mine", **OLD}


def test_a_relative_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """The message names the folder and not a file that only we know of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / utils.LOCK_FILE).mkdir(parents=True)
    (tmp_path / "link").symlink_to("model")
    for name in ("model", "link"):
        with pytest.raises(UserError, match="^cannot write .*/model: .*nothing was replaced"):
            write_folder(name, **OLD)


def test_a_config_that_is_not_written_stays(tmp_path):
    """Several new files, but none of a model, in a folder that has a config.json of its own."""
    write_folder(tmp_path / "model", **OLD)
    write_folder(tmp_path / "model", **{"a.txt": "a", "b.txt": "b"})
    assert content_of(tmp_path / "model") == {**OLD, "a.txt": "a", "b.txt": "b"}


def test_two_new_files_beside_an_unchanged_config(tmp_path):
    write_folder(tmp_path / "model", **OLD)
    new = {**OLD, "model_state.pdparams": "new", "vocab.txt": "w"}
    write_folder(tmp_path / "model", **new)
    assert content_of(tmp_path / "model") == new


def test_a_second_writer_waits_for_the_first(tmp_path):
    code = (
        "import sys, utils\n"
        "with utils.atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'config.json').write_text('second')\n"
    )
    with utils.atomic_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("first")
        second = subprocess.Popen([sys.executable, "-c", code, tmp_path / "model"], cwd=REPO)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(timeout=2)
        assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert second.wait(timeout=60) == 0
    assert content_of(tmp_path / "model") == {"config.json": "second"}


@pytest.mark.parametrize("fault", ["exception", "fsync"])
@pytest.mark.parametrize("exists", [True, False])
def test_old_folder_stays_when_writing_fails(tmp_path, monkeypatch, fault, exists):
    if exists:
        write_folder(tmp_path / "model", **OLD)
    with pytest.raises(UserError if fault == "fsync" else ZeroDivisionError):
        with utils.atomic_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("new")
            if fault == "exception":
                raise ZeroDivisionError
            (folder / "model_state.pdparams").write_text("new")
            full_disk(monkeypatch)
    assert os.listdir(tmp_path) == (["model"] if exists else [])
    assert not exists or content_of(tmp_path / "model") == OLD


HOLD = (
    "import sys, time, utils\n"
    "with utils.run_lock('--save_dir', sys.argv[1], 'training'):\n"
    "    print('locked', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def held(tmp_path):
    """(folder, process): another process has it for a whole run."""
    command = [sys.executable, "-c", HOLD, tmp_path / "new" / "model"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield tmp_path / "new" / "model", process
        process.kill()


def refusal(folder):
    with pytest.raises(UserError) as error:
        with utils.run_lock("--output_dir", folder, "pruning"):
            pass
    return str(error.value)


def test_a_second_run_is_told_of_the_first_and_a_killed_one_locks_nothing(held):
    folder, process = held
    advice = "wait until it ends, or give another folder"
    where = f"--output_dir {folder}: "
    who = f"a training is running here (process {process.pid}"
    assert refusal(folder) == f"{where}{who}); {advice}"
    holder = folder / f"{utils.RUN_FILE}.json"
    run = json.loads(holder.read_text())
    holder.write_text(json.dumps({**run, "host": "gpu2"}))
    assert refusal(folder) == f"{where}{who} on gpu2); {advice}"
    for content in ("", "[]", "{}"):  # it is starting just now
        holder.write_text(content)
        assert refusal(folder) == f"{where}another run is writing here; {advice}"
    process.kill()
    process.wait()
    assert len(os.listdir(folder)) == 2
    with utils.run_lock("--save_dir", folder, "training"):
        (folder / "log").write_text("x")
    assert content_of(folder) == {"log": "x"}


def test_files_are_replaced_during_a_run(held):
    """By the run itself and by others, such as export_model.py: this lock is another one."""
    folder, _ = held
    write_folder(folder, **OLD)
    with utils.run_lock("--save_dir", folder.parent, "training"):
        write_folder(folder.parent, **OLD)
    assert content_of(folder.parent) == OLD and OLD.items() <= content_of(folder).items()


def test_folders_that_a_run_made_and_left_empty_go_again(tmp_path):
    (tmp_path / "mine").mkdir()
    with utils.run_lock("--save_dir", tmp_path / "mine" / "a" / "b", "training"):
        assert len(os.listdir(tmp_path / "mine" / "a" / "b")) == 2
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == []


def test_a_run_where_nothing_can_be_written(tmp_path):
    (tmp_path / "model" / f"{utils.RUN_FILE}.lock").mkdir(parents=True)  # as if it were read-only
    (tmp_path / "file").write_text("mine")
    for name, why in (("model", "Is a directory"), ("file", "File exists")):
        message = f"cannot write {tmp_path / name}: {why}; give another --output_dir"
        assert refusal(tmp_path / name) == message
    assert content_of(tmp_path) == {"file": "mine"}
