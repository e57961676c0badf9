"""deploy/predictor: the same answers as predict.py without Paddle, int8, caching, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import evaluate
import infer
import numpy as np
import onnx
import paddle
import predictor
import pytest
from conftest import GRAPH_FILES, REPO, SAMPLE

import export_model
import metric
import model as models
import predict
import utils

(GRAPH,) = GRAPH_FILES & {"float32.pdmodel", "float32.json"}

LABELS = utils.read_labels(SAMPLE / "label.txt")
DEV_TEXTS, DEV_LABELS = utils.read_examples(SAMPLE / "dev.txt", LABELS)
INFER = REPO / "deploy" / "predictor" / "infer.py"


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A copy of the bundle that a test may change."""
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.txt").write_text("\n".join(DEV_TEXTS) + "\n", encoding="utf-8")
    shutil.copy(SAMPLE / "dev.txt", folder)
    return folder


def argv(folder, data, *extra):
    args = ["--device", "cpu", "--model_path_prefix", folder / "float32", "--dataset_dir", data]
    return [str(a) for a in [*args, *extra]]


def stamp(path):
    return path.stat().st_mtime_ns, path.read_bytes()


# ------------------------------------------------------------------------------- the same answers
@pytest.mark.core
@pytest.mark.parametrize("name", ["o.txt", "o.jsonl"])
def test_result_is_that_of_predict(bundle, checkpoint, data, tmp_path, name):
    """Same lines, same labels; a probability may differ in the last digits."""
    infer.main(argv(bundle, data, "--output_file", tmp_path / name))
    flags = ["--device", "cpu", "--dataset_dir", data, "--params_path", checkpoint]
    predict.main([str(a) for a in [*flags, "--output_file", tmp_path / f"p{name}"]])
    assert (tmp_path / name).read_bytes() == (tmp_path / f"p{name}").read_bytes()
    infer.main(argv(bundle, data, "--output_file", tmp_path / "s.jsonl", "--output_scores"))
    predict_flags = [*flags, "--output_file", tmp_path / "ps.jsonl", "--output_scores"]
    predict.main([str(a) for a in predict_flags])
    ours, theirs = (
        [json.loads(line)["scores"] for line in open(tmp_path / n, encoding="utf-8")]
        for n in ("s.jsonl", "ps.jsonl")
    )
    assert [list(row) for row in ours] == [list(row) for row in theirs] and len(ours) == 400
    scores = [[list(row.values()) for row in rows] for rows in (ours, theirs)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-4)


def test_windows_of_long_texts(bundle, checkpoint, data, tmp_path, run_cli):
    """predict.py, infer.py, evaluate.py and the class agree; more is found than by truncation."""
    parts = [text for text in DEV_TEXTS if 30 < len(text) < 120][:120]
    texts = [*map("".join, utils.chunks(parts, 6)), *DEV_TEXTS[:10]]
    (data / "data.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    flags = ["--device", "cpu", "--dataset_dir", data, "--params_path", checkpoint]
    window = ["--long_text", "window"]
    results = []
    for main, args in ((infer.main, argv(bundle, data)), (predict.main, flags)):
        status, log = run_cli(main, [*args, "--output_file", tmp_path / "o.txt", *window])
        assert status == 0 and "tails are cut" not in log
        message = "20 of 30 texts (66.7%) are longer than max_seq_length 128; they were split"
        assert log.count(message) == 1
        results.append((tmp_path / "o.txt").read_bytes())
    assert results[0] == results[1]
    _, label_ids = utils.read_examples(tmp_path / "o.txt", LABELS)
    names, _ = predictor.Predictor(bundle / "float32", long_text="window").predict(texts)
    assert [[LABELS[i] for i in ids] for ids in label_ids] == names
    cut, _ = predictor.Predictor(bundle / "float32").predict(texts)
    assert names[20:] == cut[20:]
    found, more = (sum(map(len, some[:20])) for some in (cut, names))
    assert more > 1.5 * found and all(set(a) <= set(b) for a, b in zip(cut, names))
    # As gold labels they are what evaluate.py finds.
    shutil.copy(tmp_path / "o.txt", data / "dev.txt")
    flags += ["--skip_train", "--bad_case_path", tmp_path / "bad.txt", *window]
    status, log = run_cli(evaluate.main, [*flags, "--json_path", tmp_path / "r.json"])
    assert status == 0 and log.count("they were split into windows") == 1
    assert utils.read_json(tmp_path / "r.json")["dev"]["subset_accuracy"] == 1


def test_printed_labels(bundle, data, capfd):
    (data / "data.txt").write_text("\n".join([*DEV_TEXTS[:3], ""]), encoding="utf-8")
    infer.main(argv(bundle, data))
    out, err = capfd.readouterr()
    names, _ = predictor.Predictor(bundle / "float32").predict(DEV_TEXTS[:3])
    assert out == "".join(
        f"input data: {text}\nlabels: {','.join(given)}\n----------------------------\n"
        for text, given in zip(DEV_TEXTS, names)
    )
    for line in ("Creating Engine ...", "Use CPU to inference ...", "Engine Created ..."):
        assert f">>> [InferBackend] {line}" in err


def test_small_chunks_and_a_pipe_change_nothing(bundle, data, tmp_path, monkeypatch):
    infer.main(argv(bundle, data, "--output_file", tmp_path / "whole.txt"))
    command = [sys.executable, INFER, *argv(bundle, data, "--data_file", "/dev/stdin")]
    command += ["--output_file", tmp_path / "pipe.txt"]
    subprocess.run(command, input=(data / "data.txt").read_bytes(), check=True)
    monkeypatch.setattr(utils, "CHUNK_CELLS", 7 * 20)
    infer.main(argv(bundle, data, "--output_file", tmp_path / "parts.txt"))
    for name in ("pipe.txt", "parts.txt"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_thresholds_of_the_bundle_decide(own_bundle):
    everything = predictor.Predictor(own_bundle / "float32").predict(DEV_TEXTS[:5])[1]
    path = own_bundle / "config.json"
    config = {**utils.read_json(path), "thresholds": [0.0] * 20}
    path.write_text(json.dumps(config), encoding="utf-8")
    names, probs = predictor.Predictor(own_bundle / "float32").predict(DEV_TEXTS[:5])
    assert names == [LABELS] * 5 and np.array_equal(probs, everything)


def test_least_and_most_labels(limited, data, tmp_path):
    """Of the bundle, of flags, of the class."""
    _, folder, texts, expected = limited
    (data / "data.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")

    def labels(*flags):
        infer.main(argv(folder, data, "--output_file", tmp_path / "o.jsonl", *flags))
        return [json.loads(line)["labels"] for line in open(tmp_path / "o.jsonl", encoding="utf-8")]

    assert labels() == expected
    assert {len(names) for names in labels("--min_labels", "0", "--max_labels", "20")} > {0, 1, 2}
    one = predictor.Predictor(folder / "float32", max_labels=1).predict(texts[:50])[0]
    assert [len(names) for names in one] == [1] * 50
    counts = metric.MultiLabelCounts(20)
    ids = [[LABELS.index(name) for name in given] for given in expected]
    counts.update(utils.multi_hot(ids, 20), utils.multi_hot(ids, 20))
    measured = infer.perf(predictor.Predictor(folder / "float32"), texts, ids)
    assert measured["micro_f1"] == 100 * counts.micro_f1 == 100


def test_other_length_and_other_tokenizer(bundle, tmp_path):
    short = predictor.Predictor(bundle / "float32", max_seq_length=4)
    assert [len(ids) for ids in short.encode(DEV_TEXTS[:2])] == [4, 4]
    lines = (bundle / "vocab.txt").read_text(encoding="utf-8").splitlines()
    swapped = "\n".join([*lines[:5], *reversed(lines[5:])])
    (tmp_path / "vocab.txt").write_text(swapped, encoding="utf-8")
    other = predictor.Predictor(bundle / "float32", tokenizer_path=tmp_path)
    plain = predictor.Predictor(bundle / "float32")
    assert other.encode(DEV_TEXTS[:1])[0][1] != plain.encode(DEV_TEXTS[:1])[0][1]


def test_cut_texts_are_counted(bundle, data, tmp_path, run_cli):
    (data / "data.txt").write_text("短\n" + "长" * 200 + "\n", encoding="utf-8")
    _, err = run_cli(infer.main, argv(bundle, data, "--output_file", tmp_path / "o.txt"))
    assert "1 of 2 texts (50.0%) are longer than max_seq_length 128; their tails are cut" in err


def test_a_terminal_without_chinese(bundle, data):
    (data / "data.txt").write_text("婚后\N{HEAVY BLACK HEART}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "gbk"}
    command = [sys.executable, INFER, *argv(bundle, data)]
    run = subprocess.run(command, capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode("gbk").startswith("input data: 婚后\\u2764\n")


# ------------------------------------------------------------------------------------------- perf
def test_perf_prints_f1_and_speed(bundle, data, capfd):
    infer.main(argv(bundle, data, "--perf"))
    first, second, third = capfd.readouterr().out.splitlines()
    names, _ = predictor.Predictor(bundle / "float32").predict(DEV_TEXTS)
    counts = metric.MultiLabelCounts(20)
    ids = [[LABELS.index(name) for name in given] for given in names]
    counts.update(utils.multi_hot(ids, 20), utils.multi_hot(DEV_LABELS, 20))
    assert counts.micro_f1 > 0.9
    figures = 100 * counts.micro_f1, 100 * counts.macro_f1
    assert first == "micro f1: {:.2f}, macro f1: {:.2f}".format(*figures)
    assert re.fullmatch(r"sample nums: 400, time: \d+\.\d\d, latency: \d+\.\d\d ms", second)
    assert re.fullmatch(
        r"p50: \d+\.\d\d ms, p99: \d+\.\d\d ms per batch of 32, \d+\.\d texts/s, "
        r"tokenisation apart: \d+\.\d{3} ms per text",
        third,
    )


def test_perf_counts_forward_passes_once_and_without_warm_up(bundle):
    """400 texts are 13 batches; 5 of them run before, and their time is not counted."""
    measured = predictor.Predictor(bundle / "float32")
    calls, forward = [], measured.forward

    def slow(**batch):
        calls.append(batch["input_ids"].shape)
        time.sleep(0.02)
        return forward(**batch)

    measured.forward = slow
    result = infer.perf(measured, DEV_TEXTS, DEV_LABELS)
    assert len(calls) == infer.WARM_UP + 13 and calls[:5] == calls[5:10]
    assert result["texts"] == 400 and 13 * 0.02 < result["seconds"] < 18 * 0.02 + 2
    assert result["p50_ms"] >= 20 and result["p99_ms"] >= result["p50_ms"]
    assert result["texts_per_second"] == pytest.approx(400 / result["seconds"])


# --------------------------------------------------------------------------------- int8 and fp16
@pytest.mark.core
def test_int8_quantises_every_weight_and_keeps_the_labels(own_bundle):
    prefix = own_bundle / "float32"
    names, probs = predictor.Predictor(prefix).predict(DEV_TEXTS)
    int8_names, int8_probs = predictor.Predictor(prefix, precision="int8").predict(DEV_TEXTS)
    same = sum(a == b for a, b in zip(names, int8_names))
    assert same >= 0.98 * len(DEV_TEXTS) and np.abs(probs - int8_probs).mean() < 0.01
    assert not np.array_equal(probs, int8_probs)
    graph = onnx.load(str(own_bundle / "int8_model.onnx")).graph
    operations = [node.op_type for node in graph.node]
    # Two layers of query, key, value, output and two feed-forward products; pooler; classifier.
    assert operations.count("MatMulInteger") == 2 * 6 + 2 and "Gemm" not in operations
    assert operations.count("MatMul") == 2 * 2  # attention scores and their sum have no weights
    floats = [i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    matrices = {i.name: i.dims for i in graph.initializer if i.name in floats and len(i.dims) > 1}
    assert not [name for name, dims in matrices.items() if np.prod(dims) > 1000], matrices
    size = {name: (own_bundle / file).stat().st_size for name, file in utils.ONNX_FILES.items()
            if name != "fp16"}  # fmt: skip
    assert size["int8"] < 0.35 * size["fp32"]


@pytest.mark.core
def test_fp16_model_has_float32_logits_like_the_model(own_bundle):
    """The file that a GPU runs; the CPU can run it slowly, too."""
    prefix = own_bundle / "float32"
    predictor.make_onnx(prefix, "fp16")
    sizes = [(own_bundle / utils.ONNX_FILES[p]).stat().st_size for p in ("fp16", "fp32")]
    assert sizes[0] < 0.55 * sizes[1]
    full, half = (predictor.open_session(prefix, precision) for precision in ("fp32", "fp16"))
    encoded = predictor.Predictor(prefix).encode(DEV_TEXTS[:64])
    logits = [utils.logits_of(predictor.onnx_forward(s), encoded, 16, 20) for s in (full, half)]
    assert half.get_outputs()[0].type == "tensor(float)"
    np.testing.assert_allclose(*logits, rtol=0, atol=0.05)
    assert not np.array_equal(*logits)


# -------------------------------------------------------------------------------------- the cache
def test_onnx_files_are_made_once_and_again_for_other_weights(own_bundle, checkpoint, tmp_path):
    prefix = own_bundle / "float32"
    for path in own_bundle.glob("*.onnx"):
        path.unlink()
    probs = predictor.Predictor(prefix, precision="int8").predict(DEV_TEXTS[:8])[1]
    files = [own_bundle / "model.onnx", own_bundle / "int8_model.onnx"]
    before = [stamp(file) for file in files]
    predictor.Predictor(prefix, precision="int8")
    predictor.Predictor(prefix)
    assert [stamp(file) for file in files] == before
    # Other weights are put into the folder; the ONNX files of the old ones stay behind.
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = models.load_weights(other / utils.WEIGHTS_FILE)
    with open(other / utils.WEIGHTS_FILE, "wb") as file:
        models.save_weights(file, {k: v * np.float32(0.5) for k, v in weights.items()})
    export = tmp_path / "export"
    export_model.main(["--params_path", str(other), "--output_path", str(export)])
    for file in export.iterdir():
        shutil.copy(file, own_bundle)
    again = predictor.Predictor(prefix, precision="int8").predict(DEV_TEXTS[:8])[1]
    assert np.abs(again - probs).max() > 0.1
    assert all(stamp(file)[1] != old[1] for file, old in zip(files, before))


def start(args, **kwargs):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(INFER), *args], **pipes, **kwargs)


def test_two_processes_on_a_fresh_bundle(own_bundle, data):
    (own_bundle / "model.onnx").unlink()
    processes = [start(argv(own_bundle, data, "--use_quantize", "--perf")) for _ in range(2)]
    (out_a, err_a), (out_b, err_b) = (p.communicate(timeout=300) for p in processes)
    assert [p.returncode for p in processes] == [0, 0], err_a + err_b
    assert out_a.splitlines()[0] == out_b.splitlines()[0]
    assert (err_a + err_b).count(f"Make {own_bundle / 'model.onnx'} (once)") == 1
    assert not list(own_bundle.glob("*.tmp")) and not list(own_bundle.glob(".*.tmp"))


def test_killed_while_it_makes_the_file(own_bundle, data):
    (own_bundle / "model.onnx").unlink()
    process = start(argv(own_bundle, data), start_new_session=True)
    for line in process.stderr:
        if "(once)" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (own_bundle / "model.onnx").exists()
    assert predictor.Predictor(own_bundle / "float32").predict(["婚后生育一子。"])[0]


def test_terminated_it_leaves_nothing(bundle, data, tmp_path):
    process = start(argv(bundle, data, "--data_file", "/dev/stdin", "--output_file", "o.txt"),
                    stdin=subprocess.PIPE, cwd=tmp_path)  # fmt: skip
    process.stdin.write("婚后\n")
    process.stdin.flush()
    for line in process.stderr:
        if "Engine Created" in line:
            break
    while not list(tmp_path.glob(".o.txt.*.tmp")):
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and [p.name for p in tmp_path.iterdir()] == ["data"]


def test_needs_neither_paddle_nor_packages_beyond_its_requirements(own_bundle, data):
    """With Paddle and the converter out of reach, from a bundle that holds model.onnx only."""
    for path in own_bundle.glob("float32.*"):
        path.unlink()
    requirements = (INFER.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = (line.split("#")[0].strip() for line in requirements)
    listed = {re.split("[=<>]", line)[0] for line in lines if line}
    assert {"onnxruntime", "onnx", "tokenizers", "numpy", "tqdm", "filelock", "joblib"} == listed
    code = (
        "import sys\n"
        "absent = 'paddle paddle2onnx paddlenlp sklearn scipy pandas matplotlib torch'.split()\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        f"sys.path.insert(0, {str(INFER.parent)!r})\n"
        "import infer\n"
        f"infer.main({argv(own_bundle, data, '--perf')!r})\n"
        f"infer.main({argv(own_bundle, data, '--perf', '--use_quantize')!r})\n"
        "assert not [m for m in sys.modules if m.startswith('paddle') and sys.modules[m]]\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("micro f1: ") == 2


# -------------------------------------------------------------------------------------- bad input
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_labels(folder):
    config = utils.read_json(folder / "config.json")
    config["id2label"] = dict(list(config["id2label"].items())[:7])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def other_model(folder):
    """The description of another model beside this one's weights."""
    config = {**utils.read_json(folder / "config.json"), "model_sha256": "0" * 64}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def other_model_without_graph(folder):
    other_model(folder)
    remove(folder, GRAPH, "float32.pdiparams")


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


BROKEN_BUNDLES = {
    "no model file": (
        lambda f: remove(f, "model.onnx", GRAPH),
        "float32.pdmodel or float32.json: no such file; export again (--onnx for hosts without Pa",
    ),
    "no weights": (
        lambda f: remove(f, "model.onnx", "float32.pdiparams"),
        "float32.pdiparams: no such file",
    ),
    "ONNX file cut short": (lambda f: cut(f / "model.onnx"), "model.onnx: not a readable ONNX"),
    "weights cut short": (
        lambda f: (remove(f, "model.onnx"), cut(f / "float32.pdiparams")),
        "not the files that config.json beside them describes (cut short, or of another model)",
    ),
    "static graph of another model": (other_model, "not the files that config.json beside them"),
    "ONNX file of another model": (
        other_model_without_graph,
        "float32.pdmodel or float32.json: no such file; export again",
    ),
    "other number of labels": (other_labels, "20 classes, 7 labels in config.json"),
    "vocabulary of another model": (
        lambda f: (f / "vocab.txt").write_text("[PAD]\n", encoding="utf-8"),
        "vocab.txt: [CLS], [SEP], [MASK], [UNK] missing",
    ),
    "no config": (lambda f: remove(f, "config.json"), "config.json: No such file or directory"),
    "config is no JSON": (lambda f: cut(f / "config.json"), "config.json: not valid JSON"),
}


@pytest.mark.parametrize("break_it, message", BROKEN_BUNDLES.values(), ids=BROKEN_BUNDLES)
def test_broken_bundles(own_bundle, data, tmp_path, run_cli, break_it, message):
    break_it(own_bundle)
    args = argv(own_bundle, data, "--output_file", tmp_path / "output.txt")
    status, err = run_cli(infer.main, args)
    error = err[err.index("error: ") :]
    assert status == 2 and message in error and len(error.splitlines()) == 1, err
    assert not (tmp_path / "output.txt").exists()


def test_a_bundle_that_cannot_be_written(own_bundle, data, run_cli):
    (own_bundle / utils.LOCK_FILE).mkdir()  # as for a read-only folder the lock can't be made
    status, err = run_cli(infer.main, argv(own_bundle, data, "--use_quantize"))
    assert status == 2 and "int8_model.onnx: Is a directory; run once where the bundle can" in err
    assert run_cli(infer.main, argv(own_bundle, data))[0] == 0  # model.onnx is there


def test_conversion_that_fails(own_bundle, data, run_cli, monkeypatch):
    def full(source, path):
        raise RuntimeError("write failed\nC++ call stack")

    monkeypatch.setattr(predictor, "_quantize", full)
    status, err = run_cli(infer.main, argv(own_bundle, data, "--use_quantize"))
    assert status == 2 and "int8_model.onnx: RuntimeError: write failed; is there room in" in err
    assert not (own_bundle / "int8_model.onnx").exists()


def test_a_bundle_that_changes_while_its_file_is_made(own_bundle, data, run_cli, monkeypatch):
    make = predictor.make_onnx

    def made_then_exported_again(prefix, precision):
        make(prefix, precision)
        other_model(own_bundle)

    monkeypatch.setattr(predictor, "make_onnx", made_then_exported_again)
    status, err = run_cli(infer.main, argv(own_bundle, data, "--use_quantize"))
    assert status == 2 and "changed while int8_model.onnx was made; run the command again" in err


def test_tokenizer_with_more_tokens_than_the_model(bundle, data, tmp_path, run_cli):
    lines = (bundle / "vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "vocab.txt").write_text(lines + "一\n二\n", encoding="utf-8")
    status, err = run_cli(infer.main, argv(bundle, data, "--model_name_or_path", tmp_path))
    assert status == 2 and "not its vocabulary" in err


def test_int8_of_an_onnx_file_cut_short(own_bundle, data, run_cli):
    cut(own_bundle / "model.onnx")
    status, err = run_cli(infer.main, argv(own_bundle, data, "--use_quantize"))
    assert status == 2 and "model.onnx: not a readable ONNX model" in err
    assert not (own_bundle / "int8_model.onnx").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "data.txt: empty file; write one text per line"),
        ("好".encode() * 333_334, "data.txt:1: longer than 500000 bytes; put one text on a line"),
        (b"abc\n" + b"x" * 1_000_000 + b"\nabc\n", "data.txt:2: longer than 500000 bytes"),
        ("婚后\n".encode() + b"\xff\xfe\n", "data.txt:2: not valid UTF-8 (byte 0xff at column 1)"),
        (None, "data.txt: No such file or directory; check the path"),
    ],
)
def test_bad_data(bundle, data, tmp_path, run_cli, content, message):
    path = data / "data.txt"
    path.unlink() if content is None else path.write_bytes(content)
    output = tmp_path / "output.txt"
    output.write_text("earlier result")
    status, err = run_cli(infer.main, argv(bundle, data, "--output_file", output))
    error = err[err.index("error: ") :]
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert output.read_text() == "earlier result" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "gpu"], "--device gpu: ONNX Runtime's CUDA provider is not usable"),
        (["--use_fp16"], "--use_fp16 needs --device gpu"),
        (["--device", "gpu", "--use_quantize"], "--use_quantize needs --device cpu"),
        (["--device_id", "x"], "invalid int value: 'x'"),
        (["--num_threads", "0"], "0 is not a number of at least 1"),
        (["--max_seq_length", "161"], "--max_seq_length 161: this model takes 3 to 160 tokens"),
        (
            ["--min_labels", "3", "--max_labels", "2"],
            "min_labels 3, max_labels 2: the model has 20",
        ),
        (["--model_path_prefix", "no/float32"], "no: no such folder"),
        (["--model_path_prefix", "BUNDLE"], "is a folder; give the prefix of its files, BUNDLE/fl"),
        (["--label_file", "lable.txt"], "lable.txt: No such file or directory; check the path"),
        (["--model_path_prefix", "BUNDLE/flaot32"], "flaot32: no flaot32.pdmodel or flaot32.js"),
        (["--model_name_or_path", "ernie-3.0-medium-zh"], "no such folder; leave it out"),
        (["--output_scores"], "--output_scores needs --output_file"),
        (["--perf", "--output_file", "o.txt"], "--perf measures and writes no labels"),
        (["--perf", "--perf_dataset", "test"], "test.txt: No such file or directory"),
        (["--output_file", "no/such/o.txt"], "cannot write"),
    ],
)
def test_bad_flags(bundle, data, run_cli, flags, message):
    flags, message = ([s.replace("BUNDLE", str(bundle)) for s in x] for x in (flags, [message]))
    status, err = run_cli(infer.main, argv(bundle, data, *flags))
    assert status == 2 and message[0] in err and "Traceback" not in err


def test_labels_that_disagree(bundle, data, run_cli):
    names = "\n".join([LABELS[1], LABELS[0], *LABELS[2:]])
    (data / "label.txt").write_text(names, encoding="utf-8")
    for extra in ([], ["--perf"]):
        status, err = run_cli(infer.main, argv(bundle, data, *extra))
        assert status == 2 and f"label.txt:1: '{LABELS[1]}' where the model has" in err


def test_a_checkpoint_is_not_a_bundle(checkpoint, data, run_cli):
    status, err = run_cli(infer.main, argv(checkpoint, data))
    assert status == 2 and "a checkpoint, not a bundle; run export_model.py on it" in err


def test_converter_that_is_not_installed(own_bundle, data, run_cli, monkeypatch):
    (own_bundle / "model.onnx").unlink()
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    status, err = run_cli(infer.main, argv(own_bundle, data))
    assert status == 2 and "making model.onnx needs the package paddle2onnx" in err


# ------------------------------------------------------------------------------- the real dev set
def test_real_dev_set_agrees(shared, tmp_path):
    """A model of random weights with the real vocabulary on every real dev text."""
    import onnx_speed

    real = shared / "data" / "divorce"
    vocab = shared / "vocab" / "ernie_3.0_base_zh_vocab.txt"
    flags = ["--shape", "tiny", "--vocab_file", str(vocab), "--dataset_dir", str(real)]
    paddle.seed(3)  # of the classifier
    prefix = onnx_speed.random_bundle(onnx_speed.parse_args(flags), tmp_path)
    texts, _ = utils.read_examples(real / "dev.txt", utils.read_labels(real / "label.txt"))
    model, _ = models.load_checkpoint(tmp_path / "checkpoint")
    onnx_predictor = predictor.Predictor(prefix)
    encoded = onnx_predictor.encode(texts)
    forwards = [
        models.dygraph_forward(model),
        models.static_forward(prefix),
        onnx_predictor.forward,
    ]
    trained, *others = (utils.logits_of(forward, encoded, 32, 20) for forward in forwards)
    # The classifier is random: now and then one of 32220 logits is 0 as far as float32 can tell.
    clear = np.abs(trained) > 1e-5
    assert (~clear).sum() < 5
    for logits in others:
        np.testing.assert_allclose(logits, trained, rtol=0, atol=1e-4)
        decisions = [metric.decode(metric.probabilities(x)) for x in (logits, trained)]
        assert np.array_equal(*(given[clear] for given in decisions))


def test_what_was_hardly_meant_is_said(own_bundle, data, tmp_path, run_cli, capfd):
    """A carriage return breaks no row; texts with their labels; no label at all."""
    config = utils.read_json(own_bundle / "config.json")
    config["thresholds"] = [1.0] * len(LABELS)
    (own_bundle / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = "甲\r乙\t准予离婚\n丙\t婚后有子女\n"
    (data / "data.txt").write_text(lines, encoding="utf-8", newline="")
    for output in (["--output_file", tmp_path / "o.txt"], []):
        status, log = run_cli(infer.main, argv(own_bundle, data, *output))
        assert status == 0 and log.count("2 of 2 texts look like text<TAB>label,label, and") == 1
        assert log.count("2 of 2 texts got no label: no probability is above its threshold") == 1
    rows = "text\tlabel\n甲 乙 准予离婚\t\n丙 婚后有子女\t\n"
    assert (tmp_path / "o.txt").read_bytes().decode() == rows
    infer.main(argv(own_bundle, data))
    assert capfd.readouterr().out.startswith("input data: 甲 乙 准予离婚\nlabels: \n---")
