"""Data sets that are encoded once: what utils.encode_file writes, who reuses it, what it costs."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from conftest import REPO, SAMPLE
from test_train import LAUNCH, argv, same_weights, start

import prune
import train
import utils
from utils import UserError

LABELS = utils.read_labels(SAMPLE / "label.txt")
LINES = (SAMPLE / "train.txt").read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return utils.load_tokenizer(tiny_model)


@pytest.fixture
def encode(tokenizer, tmp_path):
    """encode(path) is utils.encode_file of a training set with a cache in tmp_path."""

    def encode(path, labels=LABELS, max_seq_length=32):
        return utils.encode_file(path, labels, tokenizer, max_seq_length, tmp_path / "cache")

    return encode


def write(path, lines):
    path.write_text("".join(lines), encoding="utf-8")
    return path


def forbidden(*_args, **_settings):
    raise AssertionError("a text was encoded again")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------- what it is
@pytest.mark.core
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_set_holds_what_reading_and_encoding_give(
    encode, tokenizer, tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(utils, "SET_CHUNK", chunk)
    path = write(tmp_path / "train.txt", [*LINES[:100], "没有标签\t\n"])
    found = utils.open_set(encode(path))
    texts, label_ids = utils.read_examples(path, LABELS)
    encoded, cut = utils.encode(texts, tokenizer, 32)
    assert 0 < cut == found.cut < 100 and found.num_tokens == sum(map(len, encoded))
    assert [ids.tolist() for ids in found[0]] == [ids.tolist() for ids in encoded]
    assert [ids.tolist() for ids in found[1]] == label_ids
    assert found.occurring.tolist() == np.unique(np.concatenate(encoded)).tolist()
    lengths = list(map(len, encoded))
    assert utils.lengths_of(found[0]).tolist() == utils.lengths_of(encoded).tolist() == lengths
    # The identity of a run that was started before there were such sets.
    rows = (np.array([len(ids), *ids], np.int32) for part in (encoded, label_ids) for ids in part)
    assert found.sha256 == hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()
    assert (found[0].values.dtype, found[1].values.dtype) == (np.uint16, np.uint8)


def test_other_line_ends_are_the_same_set_in_another_folder(encode, tmp_path):
    unix = encode(write(tmp_path / "a.txt", LINES[:10]))
    dos = tmp_path / "b.txt"
    dos.write_bytes((tmp_path / "a.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert unix != encode(dos)
    assert utils.open_set(unix).sha256 == utils.open_set(encode(dos)).sha256


def test_what_changes_the_token_ids_is_another_set(encode, tmp_path, tiny_model, tokenizer):
    path = write(tmp_path / "train.txt", LINES[:10])
    folders = [encode(path), encode(path, max_seq_length=31), encode(path, [*LABELS, "新"])]
    folders.append(encode(write(tmp_path / "more.txt", LINES[:11])))
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    folders.append(
        utils.encode_file(path, LABELS, utils.load_tokenizer(other), 32, tmp_path / "cache")
    )
    assert len(set(folders)) == 5
    assert encode(write(tmp_path / "renamed.txt", LINES[:10])) == folders[0]


# ------------------------------------------------------------------------------------------ reuse
def test_it_is_encoded_once(encode, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "train.txt", LINES[:10])
    folder = encode(path)
    assert capsys.readouterr().err.endswith(f"{path}: encoding it into {tmp_path / 'cache'}\n")
    monkeypatch.setattr(utils, "encode", forbidden)
    assert encode(path) == folder
    assert capsys.readouterr().err.endswith(f"{path}: encoded before, in {folder}\n")


@pytest.mark.parametrize("damage", ["cut", "gone", "meta", "no meta"])
def test_a_damaged_set_is_encoded_anew(encode, tmp_path, capsys, damage):
    path = write(tmp_path / "train.txt", LINES[:10])
    folder = encode(path)
    before = content(folder)
    for name in before if damage in ("cut", "gone") else [utils.SET_FILE]:
        if damage in ("gone", "no meta"):
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(b"{}" if damage == "meta" else before[name][:-1])
        capsys.readouterr()
        assert encode(path) == folder
        line = f"[ WARNING] - {folder}: damaged, so the texts are encoded anew\n"
        assert capsys.readouterr().err.count(line) == 1
        assert content(folder) == before
    assert os.listdir(tmp_path / "cache") == [folder.name]


def test_a_pipe_is_read_once(encode, tmp_path):
    path, pipe = write(tmp_path / "train.txt", LINES[:50]), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[path.read_bytes()])
    writer.start()
    folder = encode(pipe)
    writer.join()
    assert encode(path) == folder


def test_who_comes_second_waits_and_reads(encode, tmp_path, monkeypatch, capsys):
    path, calls, found = write(tmp_path / "train.txt", LINES[:50]), [], []
    waiting, encode_texts = threading.Event(), utils.encode

    def slow(*args):
        calls.append(args)
        assert waiting.wait(60)
        return encode_texts(*args)

    def log(message, *args):
        if "waiting for another process" in message:
            waiting.set()

    monkeypatch.setattr(utils, "encode", slow)
    monkeypatch.setattr(utils.logger, "info", log)
    threads = [threading.Thread(target=lambda: found.append(encode(path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 2 and found[0] == found[1]


# ----------------------------------------------------------------------------------------- faults
BAD = {
    "no tab": "a\t婚后有子女\nb\n",
    "many": "a\n" * 12,
    "label": "a\t没有\n",
    "empty": "\n \n",
    "not UTF-8": b"a\t\xff\n",
}


@pytest.mark.parametrize("name", [*BAD, "missing", "folder"])
def test_errors_of_the_data_are_those_of_read_examples(encode, tmp_path, name):
    path = tmp_path / "train.txt"
    if name in BAD:
        bad = BAD[name]
        path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    elif name == "folder":
        path.mkdir()
    with pytest.raises(UserError) as expected:
        utils.read_examples(path, LABELS)
    with pytest.raises(UserError) as found:
        encode(path)
    assert str(found.value) == str(expected.value)
    assert not (tmp_path / "cache").exists()
    if name == "many":
        assert str(found.value).endswith(f"train.txt:10: {NO_TAB}\n... and 2 more such lines")


NO_TAB = "no tab between text and labels (a text without labels ends in a tab)"


def test_warnings_are_those_of_read_examples(encode, tmp_path, capsys):
    path = write(tmp_path / "train.txt", ["\n", "a\ufeff\t\n", " \n"])
    encode(path)
    err = capsys.readouterr().err
    assert err.count(f"{path}: skipped 2 blank line(s)\n") == 1
    assert err.count(f"{path}: removed 1 byte order mark(s) (U+FEFF) inside the file") == 1


def test_a_full_disk(encode, tmp_path, run_cli):
    """A limit on file size stands for it."""
    path, cache = write(tmp_path / "train.txt", LINES[:1000]), tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        status, err = run_cli(lambda _: encode(path), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    hint = "free some space there or give another --cache_dir"
    message = f"error: cannot write encoded texts to {cache}: File too large; {hint}"
    assert status == 2 and err.splitlines()[-1] == message
    assert not cache.exists()


KILLED = """
import sys
import utils
encode, calls = utils.encode, []
def stop_in_the_middle(*args):
    calls.append(args)
    if len(calls) == 3:
        print("now", flush=True)
        sys.stdin.read()
    return encode(*args)
utils.encode, utils.SET_CHUNK = stop_in_the_middle, 10
path, labels, model, cache = sys.argv[1:]
utils.encode_file(path, utils.read_labels(labels), utils.load_tokenizer(model), 32, cache)
"""


def test_killed_in_the_middle(encode, tmp_path, tiny_model):
    path, cache = write(tmp_path / "train.txt", LINES[:50]), tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, path, SAMPLE / "label.txt", tiny_model, cache]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([str(word) for word in command], cwd=REPO, **pipes) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert any(name.endswith(".tmp") for name in os.listdir(cache))
    folder = encode(path)
    assert os.listdir(cache) == [folder.name]
    assert len(utils.open_set(folder)[0]) == 50


# ----------------------------------------------------------------------------------------- memory
def peak_of(function, *args):
    """Bytes that Python and NumPy hold at most."""
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_texts(encode, tmp_path, monkeypatch):
    """Their strings and arrays would take 300 bytes each; a block of the file is 1 MiB at most."""
    monkeypatch.setattr(utils, "SET_CHUNK", 100)
    few, many = (
        write(tmp_path / f"{n}.txt", (f"{i} 离婚\t婚后有子女\n" for i in range(n)))
        for n in (500, 10_000)
    )
    encode(write(tmp_path / "first.txt", LINES[:5]))  # what is loaded once
    peaks = [peak_of(encode, path) for path in (few, many)]
    assert peaks[1] < peaks[0] + many.stat().st_size + 100_000
    bad = write(tmp_path / "bad.txt", ["a\n"] * 10_000)

    def refused():
        with pytest.raises(UserError, match=r"\.\.\. and 9990 more such lines$"):
            encode(bad)

    assert peak_of(refused) < peaks[0] + 100_000


def test_a_plan_of_a_million_texts_takes_four_bytes_each():
    lengths = np.random.default_rng(0).integers(3, 128, 1_000_000).astype(np.int32)

    def plan():
        batches = utils.batches(lengths, 32, np.random.default_rng(7), group=2)
        assert len(batches) == 31_250 and len(batches[31_000:]) == 250

    assert peak_of(plan) < 5_500_000


@pytest.mark.core
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("batching", ["sorted", "random"])
def test_the_order_of_the_batches_is_what_it_was(batching, group):
    """Runs that an older version has stopped go on with the same batches."""
    lengths = np.random.default_rng(1).integers(3, 128, 997)
    rng = np.random.default_rng([3, 1])
    order = rng.permutation(997)
    if batching == "sorted":
        parts = np.array_split(order, -(-997 // (50 * 8 * group)))
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in parts])
    batches = [order[i : i + 8].tolist() for i in range(0, 997, 8)]
    while len(batches) % group:
        batches.append(batches[len(batches) - 125])
    groups = [batches[i : i + group] for i in range(0, len(batches), group)]
    expected = [batch for i in rng.permutation(len(groups)) for batch in groups[i]]
    found = utils.batches(lengths, 8, np.random.default_rng([3, 1]), batching, group)
    assert [batch.tolist() for batch in found] == expected
    assert [batch.tolist() for batch in found[1::group][7:]] == expected[1::group][7:]


# --------------------------------------------------------------------------------------- training
def stop_after_the_first_epoch(*args):
    """Runs train.py until then."""

    def save(trainer, save=train.Trainer.save_state):
        if trainer.progress.epoch == 1:
            raise KeyboardInterrupt
        save(trainer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "save_state", save)
        train.main(*args)


@pytest.mark.core
def test_resume_reads_the_sets_of_the_stopped_run(small_data, tiny_model, tmp_path, monkeypatch):
    args = argv(small_data, tiny_model, tmp_path / "c", "--pos_weight", "auto")
    stop_after_the_first_epoch(args)
    assert len(os.listdir(tmp_path / "c" / utils.CACHE_FOLDER)) == 2  # train and dev
    with monkeypatch.context() as patch:
        patch.setattr(utils, "encode", forbidden)
        train.main([*args, "--resume"])
    assert not (tmp_path / "c" / utils.CACHE_FOLDER).exists()
    train.main(argv(small_data, tiny_model, tmp_path / "whole", "--pos_weight", "auto"))
    assert same_weights(tmp_path / "c", tmp_path / "whole")


def test_a_cache_for_all_runs(small_data, tiny_model, tmp_path, monkeypatch):
    """Another training reads it, and prune.py, which has the same tokenizer and length."""
    flags, cache = ["--epochs", "1", "--cache_dir", tmp_path / "cache"], tmp_path / "cache"
    train.main(argv(small_data, tiny_model, tmp_path / "a", *flags))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    monkeypatch.setattr(utils, "encode", forbidden)
    train.main(argv(small_data, tiny_model, tmp_path / "b", *flags))
    paths = ["--dataset_dir", small_data, "--params_dir", tmp_path / "b", "--output_dir", tmp_path]
    args = prune.parse_args([str(a) for a in [*paths, "--cache_dir", cache]])
    with contextlib.ExitStack() as stack:
        assert [len(part[0]) for part in prune.read_data(args, LABELS, stack)] == [96, 40]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert not (tmp_path / "b" / utils.CACHE_FOLDER).exists()
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_run_that_cannot_start_leaves_no_sets(small_data, tiny_model, tmp_path, run_cli):
    """Neither does the other set of a resumed run whose data has changed keep it from going on."""
    data = shutil.copytree(small_data, tmp_path / "data")
    write(data / "dev.txt", ["a\n"])
    status, err = run_cli(train.main, argv(data, tiny_model, tmp_path / "c"))
    assert status == 2 and err.endswith(f"error: {data / 'dev.txt'}:1: {NO_TAB}\n")
    assert not (tmp_path / "c").exists()
    args = argv(small_data, tiny_model, tmp_path / "c")
    stop_after_the_first_epoch(args)
    write(data / "dev.txt", LINES[:9])
    changed = argv(data, tiny_model, tmp_path / "c", "--resume")
    status, err = run_cli(train.main, changed)
    assert status == 2 and "error: dev_file changed since the run was stopped; use the same" in err
    train.main([*args, "--resume"])
    assert not (tmp_path / "c" / utils.CACHE_FOLDER).exists()


def test_one_rank_reads_and_all_hear_of_its_error(small_data, tiny_model, tmp_path):
    """The training set is a pipe, which nobody can read twice."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    extra = ["--train_file", pipe, "--cache_dir", tmp_path / "cache"]
    process = start(argv(small_data, tiny_model, tmp_path / "c", *extra), tmp_path, LAUNCH)
    write(pipe, [*LINES[:20], "a\n"])  # waits until somebody reads
    out, _ = process.communicate(timeout=120)
    message = f"error: {pipe}:21: {NO_TAB}\n"
    assert process.returncode != 0 and message in out and "Traceback" not in out
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text("utf-8") for rank in (0, 1)]
    assert all(log.endswith(message) for log in logs), logs
    assert not (tmp_path / "c").exists() and not (tmp_path / "cache").exists()


def test_the_benchmark(tiny_model, tmp_path):
    """Two starts with one rank on a few texts."""
    command = [sys.executable, REPO / "benchmarks" / "training_memory.py", "--dataset_dir", SAMPLE]
    command += ["--model_name", tiny_model, "--texts", "500", "--ranks", "1", "--steps", "2"]
    command += ["--work_dir", tmp_path]
    result = subprocess.run([str(word) for word in command], capture_output=True, check=True)
    cold, resumed = map(json.loads, result.stdout.splitlines())
    assert (cold["start"], resumed["start"]) == ("cold", "resumed")
    assert 50 < cold["anon"] <= cold["rss"] and resumed["seconds_to_first_step"] > 0
    assert os.listdir(tmp_path) == []
