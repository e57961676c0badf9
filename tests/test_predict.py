"""predict.py on a trained checkpoint, what it refuses, and how errors reach the user."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import REPO, SAMPLE

import metric
import model as models
import predict
import utils
from utils import UserError

LABELS = utils.read_labels(SAMPLE / "label.txt")
DEV_TEXTS, DEV_LABELS = utils.read_examples(SAMPLE / "dev.txt", LABELS)


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(data, *flags) predicts the bytes or the texts `data`; returns the output as bytes."""

    def run(data, *flags, params_path=checkpoint, output="output.txt"):
        data = data if isinstance(data, bytes) else "".join(f"{t}\n" for t in data).encode()
        (tmp_path / "data.txt").write_bytes(data)
        paths = ["--dataset_dir", tmp_path, "--params_path", params_path]
        paths += ["--output_file", tmp_path / output]
        predict.main([str(a) for a in ("--device", "cpu", *paths, *flags)])
        return (tmp_path / output).read_bytes()

    return run


def rows_of(output):
    """The cells of a TSV result without its header."""
    assert output.endswith(b"\n") and b"\r" not in output
    return [line.split("\t") for line in output.decode().split("\n")[1:-1]]


# ----------------------------------------------------------------------------------- the result
@pytest.mark.core
def test_dev_set(run, checkpoint, tmp_path):
    output = run(DEV_TEXTS)
    rows = rows_of(output)
    assert output.startswith(b"text\tlabel\n") and [text for text, _ in rows] == DEV_TEXTS
    assert len({names for _, names in rows}) > 10  # so that a wrong order would show below
    texts, label_ids = utils.read_examples(tmp_path / "output.txt", LABELS)  # a training file
    assert texts == DEV_TEXTS and all(ids == sorted(ids) for ids in label_ids)
    counts = metric.MultiLabelCounts(20)
    counts.update(utils.multi_hot(label_ids, 20), utils.multi_hot(DEV_LABELS, 20))
    assert counts.micro_f1 >= 0.90


@pytest.mark.core
def test_static_graph_equals_dygraph(run, checkpoint):
    """The CPU's static graph against dygraph, one text at a time, in the order of the file."""
    output = run(DEV_TEXTS, "--output_scores")
    assert output.decode().split("\n")[0].split("\t") == ["text", "label", *LABELS]
    rows = rows_of(output)
    scores = np.array([row[2:] for row in rows], dtype=float)
    assert scores.shape == (400, 20) and all(len(p) == 8 for row in rows for p in row[2:])
    model, info = models.load_checkpoint(checkpoint)
    tokenizer = utils.load_tokenizer(checkpoint)
    encoded, _ = utils.encode(DEV_TEXTS, tokenizer, info.max_seq_length)
    forward = models.dygraph_forward(model)
    probs = metric.probabilities(np.concatenate([forward(**utils.pad([ids])) for ids in encoded]))
    np.testing.assert_allclose(scores, probs, rtol=0, atol=1e-4)
    expected = [",".join(names) for names in metric.label_names(probs > 0.5, LABELS)]
    assert [row[1] for row in rows] == expected


ODD_DATA = "\ufeff准予离婚\r\n\r\n双方\t分居\n\n  \n夫妻\u2028共同财产\n婚后\x85生育一子".encode()
ODD_TEXTS = ["准予离婚", "", "双方\t分居", "", "  ", "夫妻\u2028共同财产", "婚后\x85生育一子"]


@pytest.mark.core
@pytest.mark.parametrize("chunk", [2, 7, 8192])
def test_every_line_keeps_its_place(run, monkeypatch, chunk):
    monkeypatch.setattr(utils, "CHUNK", chunk)
    rows = rows_of(run(ODD_DATA))
    assert [row[0] for row in rows] == [text.replace("\t", " ") for text in ODD_TEXTS]
    assert {len(row) for row in rows} == {2}  # a tab in the text makes no third column
    lines = run(ODD_DATA, output="o.jsonl").decode().split("\n")
    records = [json.loads(line) for line in lines[:-1]]
    assert [record["text"] for record in records] == ODD_TEXTS
    assert [",".join(record["labels"]) for record in records] == [row[1] for row in rows]


@pytest.mark.core
def test_scores_in_json_lines(run):
    texts = DEV_TEXTS[:20]
    rows = rows_of(run(texts, "--output_scores"))
    lines = run(texts, "--output_scores", output="o.jsonl").decode().splitlines()
    assert len(lines) == 20
    for line, (text, names, *scores) in zip(lines, rows):
        record = json.loads(line)
        assert list(record) == ["text", "labels", "scores"] and "\\u" not in line
        assert record["text"] == text and ",".join(record["labels"]) == names
        assert list(record["scores"]) == LABELS
        assert list(record["scores"].values()) == pytest.approx([float(s) for s in scores])


def test_chunks_and_batches_change_nothing(run, monkeypatch):
    """Texts are read as they are needed, at most CHUNK are held, and the result is the same."""
    whole = run(DEV_TEXTS[:50])
    read, encoded, read_texts, encode = [0], [], utils.read_texts, utils.encode

    def counted(path):
        for text in read_texts(path):
            read[0] += 1
            yield text

    def watched(texts, *rest):
        encoded.append((len(texts), read[0]))
        return encode(texts, *rest)

    monkeypatch.setattr(utils, "CHUNK", 8)
    monkeypatch.setattr(utils, "read_texts", counted)
    monkeypatch.setattr(utils, "encode", watched)
    assert run(DEV_TEXTS[:50], "--batch_size", "3") == whole
    assert [size for size, _ in encoded] == [8] * 6 + [2]
    # Many labels make the chunks smaller: 5 texts x 20 labels.
    monkeypatch.setattr(utils, "CHUNK_CELLS", 119)
    assert run(DEV_TEXTS[:50]) == whole
    assert [size for size, _ in encoded[7:]] == [5] * 10
    del encoded[7:]
    assert all(n <= 8 * i + 2 for i, (_, n) in enumerate(encoded, 1))  # 2: it looks ahead


def test_thresholds_of_the_checkpoint(run, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    scores = np.array([row[2:] for row in rows_of(run(DEV_TEXTS[:60], "--output_scores"))], float)
    ordered = np.sort(scores, axis=0)
    gap = np.diff(ordered, axis=0).argmax(axis=0), range(20)  # clear of the rounding in the file
    thresholds = (ordered[:-1] + ordered[1:])[gap] / 2
    thresholds[:2] = 0, 1  # always and never
    config = utils.read_json(folder / "config.json")
    config["thresholds"] = thresholds.tolist()
    (folder / "config.json").write_text(json.dumps(config))
    rows = rows_of(run(DEV_TEXTS[:60], "--output_scores", params_path=folder))
    assert np.array([row[2:] for row in rows], float).tolist() == scores.tolist()
    expected = [",".join(names) for names in metric.label_names(scores > thresholds, LABELS)]
    assert [row[1] for row in rows] == expected
    assert all(LABELS[0] in row[1].split(",") for row in rows)
    assert all(any(name in row[1].split(",") for row in rows) for name in LABELS[2:])


LIMITS = ["--min_labels", 1, "--max_labels", 2]


@pytest.mark.core
def test_least_and_most_labels(run, limited):
    checkpoint, _, texts, expected = limited
    rows = rows_of(run(texts, *LIMITS, params_path=checkpoint))
    assert [row[1].split(",") for row in rows] == expected
    plain = [row[1] for row in rows_of(run(texts, params_path=checkpoint))]
    assert "" in plain and max(names.count(",") for names in plain) > 1


def test_sequence_length(run, checkpoint, capsys):
    texts = [text for text in DEV_TEXTS if len(text) > 20][:4]
    cut = run([text[:6] for text in texts], "--output_scores")
    assert "tails are cut" not in capsys.readouterr().err
    short = run(texts, "--output_scores", "--max_seq_length", "8")
    assert "4 of 4 texts (100.0%) are longer than max_seq_length 8" in capsys.readouterr().err
    assert [row[1:] for row in rows_of(short)] == [row[1:] for row in rows_of(cut)]


# ------------------------------------------------------------------------------------- bad input
def edit(path, **change):
    config = {**json.loads(path.read_text("utf-8")), **change}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def pickle_code(path):
    path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")


# what is done to the folder with data.txt, label.txt and model/; further flags; the message
FAULTS = {
    "no data file": (lambda f: (f / "data.txt").unlink(), [], "data.txt: No such file"),
    "empty data file": (lambda f: (f / "data.txt").write_text(""), [], "data.txt: empty file"),
    "data is not UTF-8": (
        lambda f: (f / "data.txt").write_bytes(b"a\n" * 9 + b"\xb0\xa1\n"),
        [],
        "data.txt:10: not valid UTF-8",
    ),
    "labels in another order": (
        lambda f: (f / "label.txt").write_text("\n".join(LABELS[::-1]), "utf-8"),
        [],
        f"label.txt:1: '{LABELS[-1]}' where the model has '{LABELS[0]}'",
    ),
    "too few labels": (
        lambda f: (f / "label.txt").write_text("\n".join(LABELS[:-1]), "utf-8"),
        [],
        "label.txt:20: '(nothing)' where the model has",
    ),
    "too many labels": (
        lambda f: (f / "label.txt").write_text("\n".join([*LABELS, "x"]), "utf-8"),
        [],
        "label.txt:21: 'x' where the model has '(nothing)'",
    ),
    "duplicate label": (
        lambda f: (f / "label.txt").write_text("\n".join([*LABELS, LABELS[2]]), "utf-8"),
        [],
        "label.txt:21: label",
    ),
    "no checkpoint": (lambda f: shutil.rmtree(f / "model"), [], "model: no such folder"),
    "no config": (lambda f: (f / "model/config.json").unlink(), [], "config.json: No such file"),
    "no weights": (
        lambda f: (f / "model/model_state.pdparams").unlink(),
        [],
        "model_state.pdparams: No such file",
    ),
    "no vocabulary": (lambda f: (f / "model/vocab.txt").unlink(), [], "vocab.txt: No such file"),
    "truncated weights": (
        lambda f: truncate(f / "model/model_state.pdparams"),
        [],
        "model_state.pdparams: broken weights file",
    ),
    "weights that carry code": (
        lambda f: pickle_code(f / "model/model_state.pdparams"),
        [],
        "it names os.system",
    ),
    "no label names": (lambda f: edit(f / "model/config.json", id2label=None), [], "'id2label'"),
    "another number of labels": (
        lambda f: (f / "label.txt").unlink()
        or edit(f / "model/config.json", id2label=dict(enumerate("abc"))),
        [],
        "parameter classifier.weight has shape (128, 20), the model needs (128, 3)",
    ),
    "another width": (
        lambda f: edit(f / "model/config.json", hidden_size=64),
        [],
        "parameter ernie.embeddings.word_embeddings.weight has",
    ),
    "another architecture": (
        lambda f: edit(f / "model/config.json", model_type="gpt"),
        [],
        "model_type 'gpt' is not supported",
    ),
    "vocabulary of another model": (
        lambda f: (f / "model/vocab.txt").open("a").write("".join(f"z{i}\n" for i in range(9999))),
        [],
        "vocab.txt",
    ),
    "named label file": (lambda f: None, ["--label_file", "lable.txt"], "lable.txt: No such file"),
    "too long": (lambda f: None, ["--max_seq_length", "161"], "takes 3 to 160 tokens"),
    "more labels than there are": (
        lambda f: None,
        ["--min_labels", "21"],
        "min_labels 21, max_labels None: the model has 20 labels; give 0 <= min_labels <= max_lab",
    ),
    "at most fewer than at least": (
        lambda f: edit(f / "model/config.json", max_labels=2),
        ["--min_labels", "3"],
        "min_labels 3, max_labels 2: the model has 20 labels; give 0 <= min_labels <= max_labels",
    ),
    "limits of another model": (
        lambda f: edit(f / "model/config.json", max_labels=21),
        [],
        "config.json: min_labels 0, max_labels 21: the model has 20 labels",
    ),
    "limits that are no numbers": (
        lambda f: edit(f / "model/config.json", min_labels="1"),
        [],
        "config.json: TypeError('min_labels or max_labels') missing or malformed",
    ),
    "unknown device": (lambda f: None, ["--device", "tpu"], "--device tpu"),
    "missing output folder": (lambda f: None, ["--output_file", "none/o.txt"], "none/o.txt"),
}
if not paddle.is_compiled_with_cuda():
    FAULTS["gpu on a CPU build"] = lambda f: None, ["--device", "gpu"], "--device gpu: "


@pytest.fixture
def folder(checkpoint, tmp_path):
    """data.txt, label.txt, model/ and an old output.txt; the flags that go with them."""
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copy(SAMPLE / "label.txt", tmp_path)
    (tmp_path / "data.txt").write_text("准予离婚\nz9998\n", encoding="utf-8")
    (tmp_path / "output.txt").write_text("old")
    flags = ["--dataset_dir", tmp_path, "--params_path", tmp_path / "model", "--device", "cpu"]
    return tmp_path, [*flags, "--output_file", tmp_path / "output.txt"]


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input(folder, run_cli, monkeypatch, fault):
    path, flags = folder
    monkeypatch.chdir(path)
    spoil, more_flags, message = FAULTS[fault]
    spoil(path)
    before = sorted(path.iterdir())
    status, error = run_cli(predict.main, [*flags, *more_flags])
    assert status == 2 and "Traceback" not in error
    (line,) = error[error.index("error: ") :].splitlines()
    assert message in line
    assert sorted(path.iterdir()) == before and (path / "output.txt").read_text() == "old"


def test_the_label_file_may_be_missing(folder, run_cli):
    path, flags = folder
    (path / "label.txt").unlink()
    assert run_cli(predict.main, flags)[0] == 0
    assert len(rows_of((path / "output.txt").read_bytes())) == 2


@pytest.mark.parametrize("fault", ["Ctrl-C", "full disk"])
def test_old_output_stays(folder, run_cli, monkeypatch, fault):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt if fault == "Ctrl-C" else OSError(errno.ENOSPC, "No space left")

    path, flags = folder
    before = sorted(path.iterdir())
    monkeypatch.setattr(*((metric, "decode") if fault == "Ctrl-C" else (os, "fsync")), stop)
    status, error = run_cli(predict.main, flags)
    assert status == (130 if fault == "Ctrl-C" else 2)
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert sorted(path.iterdir()) == before and (path / "output.txt").read_text() == "old"


@pytest.mark.parametrize("name", ["data.txt", "label.txt", "link", "model/config.json"])
def test_no_input_is_replaced(folder, run_cli, name):
    path, flags = folder
    (path / "link").symlink_to(path / "data.txt")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    status, error = run_cli(predict.main, [*flags, "--output_file", path / name])
    assert status == 2 and "it is an input of this command; give another name" in error
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_an_unreadable_input_is_not_blamed_on_the_output(folder, run_cli):
    """Reading it fails in the middle of writing the result."""
    path, flags = folder
    status, error = run_cli(predict.main, [*flags, "--data_file", "/proc/self/mem"])
    assert status == 2 and "error: /proc/self/mem: cannot be read (Input/output error)" in error
    with pytest.raises(OSError, match="none.txt"):
        with utils.atomic_file(path / "output.txt") as file:
            file.write(open(path / "none.txt").read())
    assert (path / "output.txt").read_text() == "old"


def test_a_pipe_is_read_once(folder):
    """More than what one read of a pipe returns; n lines give n rows."""
    path, flags = folder
    lines = "".join(f"{text}{i}\n" for i, text in enumerate(DEV_TEXTS * 8))
    command = [sys.executable, REPO / "predict.py", *flags, "--data_file", "/dev/stdin"]
    command = [str(c) for c in command]
    subprocess.run(command, input=lines.encode(), check=True, capture_output=True)
    rows = rows_of((path / "output.txt").read_bytes())
    assert [row[0] for row in rows] == lines.splitlines()


@pytest.mark.core
def test_ctrl_c_while_paddle_is_imported(folder):
    path, flags = folder
    command = [str(c) for c in [sys.executable, REPO / "predict.py", *flags]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libpaddle" not in maps.read_text():  # it is being loaded
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.endswith("no file was left half-written\n")
    assert "Traceback" not in error and (path / "output.txt").read_text() == "old"


# ---------------------------------------------------------------------------------- several ranks
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("lines", [1, 3, 4, 6, 7, 9, 18, 20])
def test_parts_are_merged_in_order(tmp_path, world, lines):
    parts = [open(tmp_path / str(rank), "w+", encoding="utf-8") for rank in range(world)]
    parts[0].write("header\n")
    for number, chunk in enumerate(utils.chunks(range(lines), 3)):
        parts[number % world].writelines(f"{i}\u2028\r\n" for i in chunk)
    for part in parts:
        part.close()
    with open(tmp_path / "merged", "w", encoding="utf-8", newline="\n") as file:
        predict.merge_parts(file, [part.name for part in parts], 3, header_lines=1)
    merged = (tmp_path / "merged").read_bytes().decode().split("\n")
    assert merged == ["header", *(f"{i}\u2028\r" for i in range(lines)), ""]


def test_two_processes_write_the_same_file(run, checkpoint, tmp_path):
    texts = [f"{text[:3]}{i}" for i, text in enumerate(DEV_TEXTS * 41)]  # two chunks and a bit
    assert len(texts) > 2 * utils.CHUNK
    expected = run(texts)
    (tmp_path / "result").mkdir()
    command = "-m paddle.distributed.launch --nproc_per_node=2 --backend=gloo --log_dir"
    script = [tmp_path / "log", REPO / "predict.py", "--device", "cpu", "--dataset_dir", tmp_path]
    script += ["--params_path", checkpoint, "--output_file", tmp_path / "result" / "output.txt"]
    command = [sys.executable, *command.split(), *map(str, script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert os.listdir(tmp_path / "result") == ["output.txt"]  # no parts are left
    assert (tmp_path / "result" / "output.txt").read_bytes() == expected


# ------------------------------------------------------------------------------------------- cli
@pytest.mark.parametrize(
    "error, message",
    [
        (UserError("train.txt:17: no tab"), "error: train.txt:17: no tab\n"),
        (OSError(errno.ENOSPC, "No space left", "f.txt"), "error: f.txt: No space left\n"),
        (OSError("broken pipe"), "error: broken pipe\n"),
        (KeyboardInterrupt(), "error: interrupted; no file was left half-written\n"),
    ],
)
def test_errors_of_the_user_are_one_line(run_cli, error, message):
    def main(argv):
        raise error

    status = 130 if isinstance(error, KeyboardInterrupt) else 2
    assert run_cli(main, []) == (status, message)
    assert run_cli(lambda argv: None, []) == (0, "")
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        run_cli(lambda argv: 1 / 0, [])


def run_code(code, **kwargs):
    """Runs Python code that uses utils.py in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, **kwargs)


def test_ctrl_c_in_a_destructor():
    """A progress bar's, for example: Python would print a traceback and go on."""
    code = """
import time, utils
class Bar:
    def __del__(self):
        raise KeyboardInterrupt
def main():
    bar = Bar()
    del bar
    for _ in range(400):
        time.sleep(0.1)
    print("went on")
utils.cli(main)
"""
    run = run_code(code, timeout=50)
    assert (run.returncode, run.stdout) == (130, "")
    assert run.stderr == "error: interrupted; no file was left half-written\n"


def test_nobody_reads_the_output():
    """As in `script | head -1`."""
    code = "import utils; utils.cli(lambda: [print('x' * 1000) for _ in range(10_000)])"
    command = (
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; echo ${{PIPESTATUS[0]}}"
    )
    run = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert run.stdout.split("\n") == ["x" * 1000, "141", ""] and run.stderr == ""


def test_stdout_closed_from_the_start():
    command = f"{shlex.quote(sys.executable)} -c 'import utils; utils.cli(lambda: None)' >&-"
    run = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    "name, status, message",
    [("SIGINT", 130, "error: interrupted; no file was left half-written\n"), ("SIGTERM", 143, "")],
)
def test_a_signal_waits_for_the_end_of_an_import(tmp_path, name, status, message):
    """PaddleNLP swallows it, Paddle 3 aborts the process."""
    (tmp_path / "greedy.py").write_text(
        "import os, signal, sys\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print('imported', flush=True)\n"
        "except BaseException:\n"
        "    pass\n"
        "x = 1\n"
    )
    code = f"import sys, utils; sys.path.append({str(tmp_path)!r})\n"
    code += "greedy = utils.LazyModule('greedy')\n"
    code += "utils.cli(lambda: print(greedy.x))"
    run = run_code(code, timeout=50)
    assert (run.returncode, run.stdout, run.stderr) == (status, "imported\n", message)


def test_help_and_mistyped_flags_do_not_wait_for_paddle():
    code = "import sys, {0}\ntry: {0}.parse_args({1})\nexcept SystemExit: pass\n"
    code += "print([m for m in sys.modules if m.startswith(('paddle.', 'paddlenlp', 'scipy'))])"
    for script in ("train", "predict", "export_model", "prune"):
        for flags in (["--help"], ["--no_such_flag", "1"]):
            run = run_code(code.format(script, flags))
            assert run.stdout.splitlines()[-1] == "[]", run.stdout + run.stderr


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root for a mount of its own"
)
@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "100000 100000", "memory.max": "123456"},
        {
            "cpu/cpu.cfs_quota_us": "100000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "123456",
        },
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_limits_of_a_container(files):
    """`docker run --cpus 1 --memory ...` on a larger machine."""
    code = "import sys, utils; sys.path.append('analysis'); import evaluate\n"
    code += "print(utils.num_cores(), evaluate.memory_bytes())"
    cores, memory = map(int, run_code(code).stdout.split())
    assert cores >= 1 and memory > 2**28
    script = "mount -t tmpfs none /sys/fs/cgroup || exit 77\n"
    for name, content in files.items():
        script += (
            f"mkdir -p $(dirname /sys/fs/cgroup/{name}); echo {content} > /sys/fs/cgroup/{name}\n"
        )
    script += f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    command = ["unshare", "-m", "sh", "-c", script]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if run.returncode in (1, 77) and "Traceback" not in run.stderr:
        pytest.skip(f"no mount of its own: {run.stderr}")
    assert run.stdout.split() == ["1", "123456"], run.stderr


# ------------------------------------------------------------------------- legal but hardly meant
DOUBTS = "look like text<TAB>label,label, and the labels were read as text; give the texts alone "
DOUBTS += "(cut -f1), or measure F1 with analysis/evaluate.py"


@pytest.mark.parametrize("chunk", [3, 8192])
def test_texts_with_their_labels(run, monkeypatch, capsys, chunk):
    """As with --data_file dev.txt, whose unlabelled samples end in a tab."""
    monkeypatch.setattr(utils, "CHUNK", chunk)
    labelled = ["甲\t准予离婚", "乙\t婚后有子女, 准予离婚", "丙\t"]
    for others in (["丁"] * 2, ["丁\t戊", "a\tb\tc"]):  # a tab before something else says nothing
        run([*labelled, *others])
        assert capsys.readouterr().err.count(f"3 of 5 texts {DOUBTS}\n") == 1
    for texts in ([*labelled, *["丁"] * 3], ["甲\t", "乙\t"], ["准予离婚", "甲\t准予离婚,没有的"]):
        run(texts)
        assert "TAB" not in capsys.readouterr().err


NOTHING = "got no label: no probability is above its threshold; train better (see the F1 on dev), "
NOTHING += "or give each text its nearest label by --min_labels 1\n"


@pytest.fixture
def cautious(checkpoint, tmp_path):
    """A model that gives no label to any text."""
    folder = shutil.copytree(checkpoint, tmp_path / "cautious")
    edit(folder / "config.json", thresholds=[1.0] * len(LABELS))
    return folder


def test_no_text_got_a_label(run, cautious, capsys):
    texts = DEV_TEXTS[:7]
    assert {names for _, names in rows_of(run(texts, params_path=cautious))} == {""}
    assert capsys.readouterr().err.count(f"7 of 7 texts {NOTHING}") == 1
    rows = rows_of(run(texts, "--min_labels", "1", params_path=cautious))  # as it says
    assert all(names in LABELS for _, names in rows)
    run(texts, "--max_labels", "0", params_path=cautious)  # none was asked for
    run([*DEV_TEXTS[:7], ""])  # one without a label is nothing unusual
    assert "got no label" not in capsys.readouterr().err


def test_carriage_returns_become_spaces(run):
    texts = ["甲\r乙", "\r准予离婚", "丙"]
    data = "".join(f"{text}\n" for text in texts).encode()
    assert [row[0] for row in rows_of(run(data))] == ["甲 乙", " 准予离婚", "丙"]
    records = map(json.loads, run(data, output="o.jsonl").decode().splitlines())
    assert [record["text"] for record in records] == texts


def test_several_processes_warn_once(cautious, tmp_path):
    """Of all their texts together."""
    texts = [f"{i}\t{LABELS[0]}\n" for i in range(utils.CHUNK + 5)]
    (tmp_path / "data.txt").write_text("".join(texts) + "\ufeff甲\n", encoding="utf-8")
    command = "-m paddle.distributed.launch --nproc_per_node=2 --backend=gloo --log_dir"
    script = [tmp_path / "log", REPO / "predict.py", "--device", "cpu", "--dataset_dir", tmp_path]
    script += ["--params_path", cautious, "--output_file", tmp_path / "output.txt"]
    command = [sys.executable, *command.split(), *map(str, script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    log = "".join(path.read_text("utf-8") for path in (tmp_path / "log").glob("workerlog.*"))
    n = utils.CHUNK + 5
    for message in (f"{n} of {n + 1} texts {DOUBTS}", f"{n + 1} of {n + 1} texts {NOTHING}"):
        assert log.count(message) == 1
    assert log.count("removed 1 byte order mark(s)") == 1
