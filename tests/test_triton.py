"""deploy/triton_serving against a real tritonserver: predict.py's answers, faults, drain, recovery.

The server is that of the PyPI package nvidia-pytriton; only its onnxruntime backend is a stand-in.
"""

import ast
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from concurrent import futures

import local_server
import make_repository
import numpy as np
import onnxruntime
import pytest
import serve
import triton_server
from conftest import REPO, SAMPLE
from test_docs import commands
from triton_server import PATIENCE, free_ports, wait_until

import metric
import predict
import utils

try:
    import grpc
    import seqcls_grpc_client
    from seqcls_grpc_client import Client, ClientError
    from tritonclient import grpc as triton_grpc
    from tritonclient import http as triton_http
    from tritonclient.grpc import service_pb2, service_pb2_grpc
    from tritonclient.utils import InferenceServerException

    HAS_SERVER = local_server.package_folder() is not None
except ImportError:
    HAS_SERVER = False

FOLDER = REPO / "deploy" / "triton_serving"
LABELS = utils.read_labels(SAMPLE / "label.txt")
TEXTS, _ = utils.read_examples(SAMPLE / "dev.txt", LABELS)
PROTOCOLS = ["grpc", "http"]
LIMIT = 100_000  # bytes of a text, the default of make_repository.py
SEED = 20221101


@pytest.fixture(scope="module")
def real_server():
    """Skips, or fails under REQUIRE_SHARED, where the server's package is not installed."""
    if not HAS_SERVER:
        why = "nvidia-pytriton or tritonclient is not installed (see Makefile)"
        if os.environ.get("REQUIRE_SHARED"):
            pytest.fail(f"REQUIRE_SHARED is set and {why}")
        pytest.skip(why)


@pytest.fixture(scope="module")
def repository(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "model_repository"
    make_repository.main(argv(bundle, folder))
    return folder


@pytest.fixture(scope="module")
def server(real_server, repository):
    """The server that most tests share; each leaves it alive and right."""
    with triton_server.TritonServer(repository) as server:
        yield server


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """What predict.py gives for the dev texts: {text: (label names, their probabilities)}."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "data.txt").write_text("\n".join([*TEXTS, "", ""]), encoding="utf-8")
    flags = ["--device", "cpu", "--dataset_dir", folder, "--params_path", checkpoint]
    flags += ["--output_file", folder / "o.jsonl", "--output_scores"]
    predict.main([str(flag) for flag in flags])
    rows = [json.loads(line) for line in open(folder / "o.jsonl", encoding="utf-8")]
    return {r["text"]: (r["labels"], [r["scores"][n] for n in r["labels"]]) for r in rows}


@pytest.fixture
def right(server, expected):
    """right() fails unless the shared server answers correctly, with the processes it had."""
    before = set(server.processes())

    def check():
        assert_same(new_client(server).classify(TEXTS[:8]), TEXTS[:8], expected)
        assert server.ready() and set(server.processes()) == before, server.log()[-3000:]

    return check


def argv(bundle, folder, *extra):
    args = ["--model_path_prefix", bundle / "float32", "--output_dir", folder, *extra]
    return [str(a) for a in args]


def new_client(server, protocol="grpc", **kwargs):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    return Client(url, protocol, **kwargs)


def assert_same(answers, texts, expected):
    """Same labels, scores within 1e-4."""
    assert len(answers) == len(texts)
    for (names, scores), text in zip(answers, texts):
        assert names == expected[text][0]
        np.testing.assert_allclose(scores, expected[text][1], rtol=0, atol=1e-4)


def load_model(folder):
    """The Python model in a version folder, outside the server: pb_utils is a plain stand-in."""
    fake = types.ModuleType("triton_python_backend_utils")
    fake.get_model_dir = lambda: str(folder)
    fake.Tensor = lambda name, array: types.SimpleNamespace(name=name, as_numpy=lambda: array)
    fake.TritonError = lambda message, code: (code, message)
    fake.TritonError.INVALID_ARG, fake.TritonError.UNAVAILABLE = "INVALID_ARG", "UNAVAILABLE"
    fake.InferenceResponse = lambda tensors=(), error=None: types.SimpleNamespace(
        tensors={t.name: t.as_numpy() for t in tensors}, error=error, has_error=lambda: bool(error)
    )
    fake.get_input_tensor_by_name = lambda request, name: fake.Tensor(name, request[name])
    sys.modules[fake.__name__] = fake
    try:
        model = runpy.run_path(str(folder / "model.py"))["TritonPythonModel"]()
    finally:
        del sys.modules[fake.__name__]
    model.initialize({})
    return model


# ------------------------------------------------------------- what the models repeat, unserved
def text_request(*texts):
    raw = [t.encode("utf-8") if isinstance(t, str) else t for t in texts]
    return {"text": np.array(raw, dtype=np.object_).reshape(-1, 1)}


def test_tokenizer_gives_the_ids_of_utils(repository, bundle):
    model = load_model(repository / "tokenizer" / "1")
    tokenizer, longest = utils.load_tokenizer(bundle), utils.read_model_info(bundle).max_seq_length
    odd = ["", " ", "[SEP]离婚[PAD]", "長" * 300, "ＡＢ㎡♥\u3007café\u0000x", "a" * 150, "\u200b"]
    for texts in ([*odd, *TEXTS[:20]], TEXTS[:3], [""], ["短"]):
        ids, _ = utils.encode(texts, tokenizer, longest)
        (response,) = model.execute([text_request(*texts)])
        ours, wanted = response.tensors["input_ids"], utils.pad(ids)["input_ids"]
        width = wanted.shape[1]
        assert ours.dtype == np.int64 and np.array_equal(ours[:, :width], wanted)
        assert not ours[:, width:].any() and ours.shape[1] == min(-(-width // 16) * 16, longest)
        assert not response.tensors["token_type_ids"].any()
        assert response.tensors["token_type_ids"].shape == ours.shape


@pytest.mark.parametrize("unit", ["中", "ab ", "a", "é", "😀", "[SEP]", " ", "\u0301", "\x01中"])
def test_tokenizer_cuts_long_texts_as_utils_does(repository, bundle, unit):
    model = load_model(repository / "tokenizer" / "1")
    longest = utils.read_model_info(bundle).max_seq_length
    texts = [unit * (LIMIT // len(unit.encode())), "一" + unit * 5000 + "二"]
    ids, _ = utils.encode(texts, utils.load_tokenizer(bundle), longest)
    sizes, whole = [], model.tokenizer
    model.tokenizer = types.SimpleNamespace(
        encode_batch=lambda heads: sizes.append(sum(map(len, heads))) or whole.encode_batch(heads)
    )
    (response,) = model.execute([text_request(*texts)])
    ours, wanted = response.tensors["input_ids"], utils.pad(ids)["input_ids"]
    assert np.array_equal(ours[:, : wanted.shape[1]], wanted)
    if unit in {"中", "ab ", "a", "é", "😀"}:
        assert sum(sizes) < 5000


@pytest.mark.parametrize("least, most", [(0, None), (1, 2), (3, 3), (0, 0), (20, 20)])
@pytest.mark.parametrize("tuned", [False, True])
def test_postprocess_decides_like_metric(repository, tmp_path, tuned, least, most):
    folder = shutil.copytree(repository / "seqcls_postprocess" / "1", tmp_path / "1")
    rng = np.random.default_rng(SEED)
    logits = rng.normal(0, 4, (200, len(LABELS))).astype(np.float32)
    logits[0], logits[1], logits[2], logits[3] = 0.0, -1e5, 1e5, -0.0
    probs = metric.probabilities(logits)
    settings = utils.read_json(folder / "settings.json")
    settings.update(min_labels=least, max_labels=most)
    if tuned:  # some of them are probabilities that occur: the comparison is strict
        settings["thresholds"] = [float(p) for p in probs[5:25].diagonal()]
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    model = load_model(folder)
    decisions = metric.decode(probs, settings["thresholds"], least, most)
    (response,) = model.execute([{"logits": logits}])
    label, confidence = response.tensors["label"], response.tensors["confidence"]
    assert label.shape == confidence.shape == (200, max(1, decisions.sum(axis=1).max()))
    for row, names in enumerate(metric.label_names(decisions, LABELS)):
        count = len(names)
        assert [name.decode("utf-8") for name in label[row, :count]] == names
        assert not any(label[row, count:]) and not confidence[row, count:].any()
        assert np.array_equal(confidence[row, :count], probs[row, decisions[row]])
    if least == 0:
        (nothing,) = model.execute([{"logits": np.full((2, len(LABELS)), -9, np.float32)}])
        assert nothing.tensors["label"].tolist() == [[b""], [b""]]


def test_postprocess_keeps_small_probabilities_apart(repository, tmp_path):
    """The sigmoid is exact near 0 as well, where min_labels looks for the best label."""
    folder = shutil.copytree(repository / "seqcls_postprocess" / "1", tmp_path / "1")
    settings = {**utils.read_json(folder / "settings.json"), "min_labels": 1}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    logits = np.full((4, len(LABELS)), -30, dtype=np.float32)
    logits[0, :3] = -16, -15.9, -15.8
    logits[1, :4] = -20, -18.5, -17.6, -19
    logits[2, :2] = -90, -80
    logits[3, :2] = 90, 15
    (response,) = load_model(folder).execute([{"logits": logits}])
    decisions = metric.decode(metric.probabilities(logits), min_labels=1)
    for row, classes in enumerate([[2], [2], [2], [0, 1]]):
        assert np.flatnonzero(decisions[row]).tolist() == classes
        names = [name.decode("utf-8") for name in response.tensors["label"][row] if name]
        assert names == [LABELS[i] for i in classes]
        exact = 1 / (1 + np.exp(-logits[row, classes].astype(np.float64)))
        confidence = response.tensors["confidence"][row, : len(classes)]
        np.testing.assert_allclose(confidence, exact, rtol=1e-6)


def test_the_models_together_give_the_labels_of_predict(limited, tmp_path):
    """Tokenizer, ONNX file and decision of a repository, one after the other."""
    _, bundle, texts, expected = limited
    made = tmp_path / "repository"
    make_repository.main(argv(bundle, made))
    tokenizer, postprocess = (
        load_model(made / name / "1") for name in ("tokenizer", "seqcls_postprocess")
    )
    session = onnxruntime.InferenceSession(str(made / "seqcls_model" / "1" / "model.onnx"))
    names = []
    for chunk in utils.chunks(texts, 64):
        (tokens,) = tokenizer.execute([text_request(*chunk)])
        (logits,) = session.run(["logits"], tokens.tensors)
        (answer,) = postprocess.execute([{"logits": logits}])
        names += [[n.decode("utf-8") for n in row if n] for row in answer.tensors["label"]]
    assert names == expected


def test_requests_of_one_batch_are_answered_each_on_its_own(repository, tmp_path, monkeypatch):
    model = load_model(repository / "tokenizer" / "1")
    good, other = text_request("婚后育有一子。"), text_request(*TEXTS[:3])
    bad = text_request("好", b"ab\xff"), text_request("长" * (LIMIT // 3), "长" * (LIMIT // 3 + 1))
    first, utf8, long, last = model.execute([good, *bad, other])
    assert len(first.tensors["input_ids"]) == 1 and len(last.tensors["input_ids"]) == 3
    where = "text 2 of the request is not valid UTF-8 (byte 0xff at position 3)"
    assert utf8.error == ("INVALID_ARG", where)
    assert long.error[1] == f"text 2 of the request has {LIMIT + 2} bytes; the limit is {LIMIT}"
    # What has begun is counted, and nothing begins once the server is to stop; see serve.py.
    monkeypatch.setenv("SEQCLS_DRAIN_DIR", str(tmp_path))
    model = load_model(repository / "tokenizer" / "1")
    model.execute([good, *bad, other])
    (tmp_path / "draining").touch()
    assert {r.error for r in model.execute([good, other])} == {
        ("UNAVAILABLE", "the server is stopping")
    }
    assert [int(path.read_bytes()) for path in tmp_path.glob("begun.*")] == [2]


def imports(path):
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    nodes = [n for n in tree if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes]
    return {name.split(".")[0] for name in names}


def test_served_and_copied_files_need_nothing_of_the_project(repository):
    for path in repository.glob("*/1/*.py"):
        allowed = {"json", "os", "re", "numpy", "tokenizers", "triton_python_backend_utils"}
        assert imports(path) <= allowed
    standard = set(sys.stdlib_module_names)
    assert imports(FOLDER / "serve.py") <= standard | {"supervisor"}
    assert imports(FOLDER / "local_server.py") <= standard | {"serve"}
    assert imports(FOLDER.parent / "supervisor.py") <= standard
    assert imports(FOLDER / "seqcls_grpc_client.py") <= standard | {"numpy", "tritonclient"}


README = "deploy/triton_serving/README.md"


def test_readme_names_every_flag_and_links_to_files():
    text = (REPO / README).read_text(encoding="utf-8")
    for script in ("make_repository.py", "serve.py", "seqcls_grpc_client.py"):
        command = [sys.executable, FOLDER / script, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        flags = re.findall(r"^  (?:--)?(\w+)", shown, re.M)
        assert {flag for flag in flags if f"`{flag}`" not in text} == set()
        assert len(flags) > 4 and shown.count("(default:") == len(flags)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / target.partition("#")[0]).exists(), target


def test_readme_command(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = (c for c in commands(README) if c[0] == "python")
    shutil.copytree(bundle, tmp_path / "export")
    make_repository.main(command[2:])
    assert (tmp_path / "model_repository" / "seqcls_model" / "1" / "model.onnx").exists()


# --------------------------------------------------------------------------- make_repository.py
def listing(folder):
    return {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if "__pycache__" not in str(p)
    }


def test_repository_is_complete(repository, bundle):
    assert listing(repository) == {
        *("seqcls", "seqcls/config.pbtxt", "seqcls/1"),
        *("seqcls_model", "seqcls_model/config.pbtxt", "seqcls_model/1"),
        "seqcls_model/1/model.onnx",
        *("tokenizer", "tokenizer/config.pbtxt", "tokenizer/1", "tokenizer/1/model.py"),
        *("tokenizer/1/tokenizer.json", "tokenizer/1/settings.json"),
        *("seqcls_postprocess", "seqcls_postprocess/config.pbtxt", "seqcls_postprocess/1"),
        *("seqcls_postprocess/1/model.py", "seqcls_postprocess/1/settings.json"),
    }
    served = (repository / "seqcls_model" / "1" / "model.onnx").read_bytes()
    assert served == (bundle / "model.onnx").read_bytes()
    limits = utils.read_json(repository / "tokenizer" / "1" / "settings.json")
    assert limits.pop("safe_cut") and limits.pop("long_word")  # see utils.safe_cut
    assert limits == {"max_seq_length": 128, "max_text_bytes": LIMIT}


@pytest.mark.parametrize("precision, device", [("fp32", "gpu"), ("fp16", "gpu"), ("int8", "cpu")])
def test_precision_and_device(bundle, tmp_path, precision, device):
    own = shutil.copytree(bundle, tmp_path / "bundle")
    rule = {"thresholds": [0.25] * len(LABELS), "min_labels": 1, "max_labels": 5}
    config = {**utils.read_json(own / "config.json"), **rule}
    (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
    flags = ["--precision", precision, "--device", device, "--max_text_bytes", "77"]
    make_repository.main(argv(own, tmp_path / "new" / "repository", *flags))
    made = tmp_path / "new" / "repository"
    served = (made / "seqcls_model" / "1" / "model.onnx").read_bytes()
    assert served == (own / utils.ONNX_FILES[precision]).read_bytes()
    text = (made / "seqcls_model" / "config.pbtxt").read_text()
    assert f"kind: KIND_{device.upper()}" in text and f"dims: [ {len(LABELS)} ]" in text
    for name in ("tokenizer", "seqcls_postprocess"):
        assert "kind: KIND_CPU" in (made / name / "config.pbtxt").read_text()
    settings = utils.read_json(made / "seqcls_postprocess" / "1" / "settings.json")
    assert settings == {"labels": LABELS, **rule}
    assert utils.read_json(made / "tokenizer" / "1" / "settings.json")["max_text_bytes"] == 77


BAD_FLAGS = {
    "fp16 on the CPU": (["--precision", "fp16"], "--precision fp16 needs --device gpu"),
    "int8 on a GPU": (["--precision", "int8", "--device", "gpu"], "int8 needs --device cpu"),
    "a folder as prefix": (["--model_path_prefix", str(REPO)], "is a folder; give the prefix"),
    "no bundle": (["--model_path_prefix", "nowhere/float32"], "nowhere: no such folder"),
    "wrong prefix": (
        ["--model_path_prefix", "BUNDLE/float"],
        "float: no float.pdmodel or float.json there",
    ),
    "other files": (["--output_dir", str(REPO / "data")], "which is no part of this repository"),
    "a file": (["--output_dir", str(REPO / "LICENSE")], "it is a file; give a folder"),
    "below a file": (["--output_dir", str(REPO / "LICENSE" / "x")], "nothing was replaced"),
    "the templates": (["--output_dir", str(FOLDER / "models")], "the bundle or the templates"),
    "in the templates": (["--output_dir", str(FOLDER / "models/x")], "the bundle or the templates"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(bundle, tmp_path, run_cli, flags, message):
    flags = [flag.replace("BUNDLE", str(bundle)) for flag in flags]
    status, err = run_cli(make_repository.main, argv(bundle, tmp_path / "r", *flags))
    assert status == 2 and message in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_the_bundle_is_not_replaced(bundle, tmp_path, run_cli):
    """Not even where it has the name of a model."""
    own = shutil.copytree(bundle, tmp_path / "repository" / "seqcls")
    (tmp_path / "link").symlink_to(own)
    for folder in (own, own.parent, tmp_path / "link"):
        status, err = run_cli(make_repository.main, argv(own, folder))
        assert (
            status == 2
            and f"--output_dir {folder}: would replace the bundle or the templates" in err
        )
    assert listing(own) == listing(bundle)
    assert {p.name for p in tmp_path.iterdir()} == {"repository", "link"}


def test_broken_bundle_leaves_the_old_repository(bundle, repository, tmp_path, run_cli):
    old = shutil.copytree(repository, tmp_path / "repository")
    own = shutil.copytree(bundle, tmp_path / "bundle")
    (own / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    status, err = run_cli(make_repository.main, argv(own, old))
    assert status == 2 and "vocab.txt: [CLS], [SEP], [MASK], [UNK] missing" in err
    assert listing(old) == listing(repository)
    assert {p.name for p in tmp_path.iterdir()} == {"repository", "bundle"}


def test_full_disk_leaves_the_old_repository(bundle, repository, tmp_path, run_cli, monkeypatch):
    old = shutil.copytree(repository, tmp_path / "repository")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "fsync", full)
    status, err = run_cli(make_repository.main, argv(bundle, old))
    assert status == 2 and "No space left on device; nothing was replaced" in err
    assert listing(old) == listing(repository) and [p.name for p in tmp_path.iterdir()] == [
        old.name
    ]


STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.mark.parametrize("number", STATUS)
def test_interrupted_make(bundle, repository, tmp_path, number):
    """It is stopped where all but the renaming is done; the next run replaces the old folder."""
    old = shutil.copytree(repository, tmp_path / "repository")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import make_repository, utils\n"
        "utils.fsync = lambda path: (print('written', flush=True), time.sleep(999))\n"
        "utils.cli(lambda: make_repository.main(sys.argv[2:]))\n"
    )
    flags = argv(bundle, old, "--max_text_bytes", 5)
    command = [sys.executable, "-c", code, str(FOLDER), *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(number)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == STATUS[number]
    assert listing(old) == listing(repository)
    make_repository.main(flags)
    assert utils.read_json(old / "tokenizer" / "1" / "settings.json")["max_text_bytes"] == 5
    assert [p.name for p in tmp_path.iterdir()] == [old.name]


def test_a_second_process_waits(bundle, tmp_path):
    flags = argv(bundle, tmp_path / "repository")
    command = [sys.executable, FOLDER / "make_repository.py", *flags]
    with utils.folder_lock(tmp_path):
        process = subprocess.Popen(command)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)  # it does nothing; were it to go on, it would be done by then
        assert not (tmp_path / "repository").exists()
    assert process.wait(PATIENCE) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


def test_killed_between_the_renames(bundle, repository, tmp_path, run_cli):
    shutil.copytree(repository, tmp_path / ".repository.old.tmp")
    own = argv(bundle, tmp_path / "repository", "--model_path_prefix", "nowhere/float32")
    assert run_cli(make_repository.main, own)[0] == 2
    assert listing(tmp_path / "repository") == listing(repository)
    assert [p.name for p in tmp_path.iterdir()] == ["repository"]


# ----------------------------------------------------------------------------- the same answers
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 32, 64])
def test_dev_set_like_predict(server, expected, protocol, batch_size):
    client = new_client(server, protocol)
    client.check_ready()
    for texts in utils.chunks(TEXTS, batch_size):
        assert_same(client.classify(texts), texts, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_empty_text_and_no_label_are_ordinary(server, expected, protocol):
    client = new_client(server, protocol)
    assert_same(client.classify([""]), [""], expected)
    # An empty HTTP body is a request in Triton's raw form: one text, which is empty.
    assert post(server, INFER, b"")[0] == 200
    few = ["", TEXTS[0], "\0", "长" * (LIMIT // 3)]
    assert client.classify(few)[1][0] == expected[TEXTS[0]][0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_label_above_the_threshold(real_server, bundle, tmp_path, protocol, own_thresholds):
    answers = new_client(own_thresholds, protocol).classify(TEXTS[:3])
    assert answers == [([], [])] * 3


@pytest.fixture(scope="module")
def own_thresholds(real_server, bundle, tmp_path_factory):
    """A server of int8 weights whose thresholds nothing reaches."""
    folder = tmp_path_factory.mktemp("strict")
    own = shutil.copytree(bundle, folder / "bundle")
    config = {**utils.read_json(own / "config.json"), "thresholds": [1.0] * len(LABELS)}
    (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
    make_repository.main(argv(own, folder / "repository", "--precision", "int8"))
    with triton_server.TritonServer(folder / "repository") as server:
        yield server


def run_client(folder, *flags):
    """The client script alone in a folder, as on another machine."""
    shutil.copy(FOLDER / "seqcls_grpc_client.py", folder)
    command = [sys.executable, "seqcls_grpc_client.py", *map(str, flags)]
    run = subprocess.run(command, cwd=folder, capture_output=True, timeout=PATIENCE)
    return run.returncode, run.stdout.decode("utf-8"), run.stderr.decode("utf-8")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_client_prints(server, expected, tmp_path, protocol):
    url = server.grpc_url if protocol == "grpc" else server.http_url
    flags = ["--protocol", protocol, "--url", url]
    (tmp_path / "texts.txt").write_bytes("\ufeff".encode() + "\r\n".join(TEXTS[:5]).encode())
    status, out, err = run_client(tmp_path, *flags, "--data_file", "texts.txt", "--batch_size", 2)
    assert (status, err) == (0, "")
    for text, lines in zip(TEXTS, utils.chunks(out.splitlines(), 4), strict=False):
        names, scores = expected[text]
        assert lines[0] == f"text:  {text}" and lines[1] == f"label:  {','.join(names)}"
        printed = [float(s) for s in lines[2].removeprefix("confidence:  ").split(",") if s]
        np.testing.assert_allclose(printed, scores, atol=6e-4)
        assert lines[3] == "-" * 20
    assert len(out.splitlines()) == 20
    assert run_client(tmp_path, *flags)[1].count("label: ") == 4  # built-in samples


def test_client_prints_a_text_without_labels(own_thresholds, tmp_path):
    status, out, _ = run_client(tmp_path, "--url", own_thresholds.grpc_url)
    assert status == 0 and out.splitlines()[1:3] == ["label:  ", "confidence:  "]


def test_client_errors(server, tmp_path):
    (free,) = free_ports(1)
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "long.txt").write_text("短\n" * 3 + "长" * LIMIT, encoding="utf-8")
    at = {"grpc": server.grpc_url, "http": server.http_url}
    grpc, http_ = (["--protocol", name, "--url", url] for name, url in at.items())
    for flags, message in [
        (["--url", f"127.0.0.1:{free}"], f"no answer from 127.0.0.1:{free} over grpc"),
        (["--protocol", "http", "--url", f"127.0.0.1:{free}"], "Connection refused"),
        (["--url", at["http"]], "is this its grpc port?"),
        (["--protocol", "http", "--url", at["grpc"]], "is this its http port?"),
        (["--url", f"http://{at['http']}"], "give host:port, without http://"),
        ([*grpc, "--model_name", "nope"], "has no model 'nope' ready"),
        ([*http_, "--model_name", "nope"], "has no model 'nope' ready"),
        ([*grpc, "--data_file", "missing.txt"], "missing.txt"),
        ([*grpc, "--data_file", "bad.txt"], "bad.txt:2: not valid UTF-8"),
        ([*grpc, "--data_file", "empty.txt"], "empty.txt: empty file"),
        ([*http_, "--data_file", "long.txt"], f"texts 1 to 4: the server at {at['http']}"),
        ([*grpc, "--data_file", "long.txt", "--batch_size", 3], "texts 4 to 4: "),
    ]:
        status, _, err = run_client(tmp_path, *flags)
        assert status == 2 and message in err and len(err.splitlines()) == 1, (flags, err)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ctrl_c_in_the_client(real_server, tmp_path, protocol):
    """While it waits for an answer that does not come."""
    shutil.copy(FOLDER / "seqcls_grpc_client.py", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "seqcls_grpc_client.py", "--protocol", protocol, "--url", url]
        command += ["--connect_timeout", str(PATIENCE)]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as process:
            connection, _ = silent.accept()
            assert connection.recv(1)  # it asks
            process.send_signal(signal.SIGINT)
            assert (process.wait(PATIENCE), process.stderr.read()) == (130, b"")
            connection.close()


def test_a_reader_that_has_seen_enough(server, tmp_path):
    shutil.copy(FOLDER / "seqcls_grpc_client.py", tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 5), encoding="utf-8")
    command = [sys.executable, "seqcls_grpc_client.py", "--url", server.grpc_url]
    command += ["--data_file", "texts.txt"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == f"text:  {TEXTS[0]}\n".encode()
        process.stdout.close()
        assert (process.wait(PATIENCE), process.stderr.read()) == (141, b"")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_lines_of_a_data_file(real_server, tmp_path, end):
    """As utils.read_texts has them, so that answer n is that of line n."""
    odd = "\ufeff一\r二\n\r\n三\r\r\n\x0b\x0c\x1c\x85\u2028\n\ufeff四".encode()
    (tmp_path / "texts.txt").write_bytes(odd + end)
    texts = list(seqcls_grpc_client.read_texts(tmp_path / "texts.txt"))
    assert texts == list(utils.read_texts(tmp_path / "texts.txt"))
    assert texts[:3] == ["一\r二", "", "三\r"]


# ----------------------------------------------------------------------------------------- faults
def post(server, path, body, headers=None):
    """(status, JSON reply) of one HTTP request."""
    connection = http.client.HTTPConnection(server.http_url, timeout=PATIENCE)
    try:
        connection.request("POST", path, body, headers or {})
        reply = connection.getresponse()
        raw = reply.read()
        return reply.status, json.loads(raw) if reply.status != 200 else raw
    finally:
        connection.close()


def json_body(name="INPUT", shape=(1, 1), datatype="BYTES", data=("婚后",)):
    tensor = {"name": name, "shape": list(shape), "datatype": datatype, "data": list(data)}
    return json.dumps({"inputs": [tensor]}).encode()


INFER = "/v2/models/seqcls/infer"
BAD_BODIES = {  # what Triton itself cannot parse it answers with 500, what it can with 400
    "malformed JSON": (INFER, b'{"inputs": [', 500, "failed to parse the request JSON"),
    "JSON of another kind": (INFER, b"[1, 2]", 500, "inputs"),
    "no inputs": (INFER, b'{"inputs": []}', 400, "expected 1 inputs but got 0"),
    "wrong key": (INFER, b'{"texts": ["a"]}', 500, "inputs"),
    "wrong input name": (INFER, json_body(name="TEXT"), 400, "TEXT"),
    "wrong dtype": (INFER, json_body(datatype="INT64", data=[1]), 400, "INT64"),
    "numbers for texts": (INFER, json_body(data=[1]), 500, "as string"),
    "wrong shape": (INFER, json_body(shape=[1, 2], data=["a", "b"]), 400, "shape"),
    "no batch dimension": (INFER, json_body(shape=[1]), 400, "shape"),
    "fewer texts than the shape says": (
        INFER,
        json_body(shape=[3, 1]),
        400,
        "expected 3 string elements",
    ),
    "negative shape": (INFER, json_body(shape=[-1, 1]), 500, "shape"),
    "empty batch": (INFER, json_body(shape=[0, 1], data=[]), 400, "expected 1 string elements"),
    "65 texts": (INFER, json_body(shape=[65, 1], data=["a"] * 65), 400, "must be <= 64"),
    "unknown model": ("/v2/models/nope/infer", json_body(), 404, "unknown model"),
    "unknown version": ("/v2/models/seqcls/versions/9/infer", json_body(), 404, "version"),
    "10 MB text": (INFER, json_body(data=["a" * 10_000_000]), 400, f"the limit is {LIMIT}"),
    "10 MB of noise": (INFER, random.Random(SEED).randbytes(10_000_000), 500, "parse"),
}


@pytest.mark.parametrize("path, body, status, message", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_http_requests(server, right, path, body, status, message):
    found, reply = post(server, path, body)
    assert found == status and message in reply["error"], reply
    right()


def infer(server, raw, shape=None, name="INPUT", datatype="BYTES", model="seqcls", channel=None):
    """One gRPC request of raw input bytes, not checked by any client library."""
    shape = shape or [1, 1]
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape
    )
    request = service_pb2.ModelInferRequest(
        model_name=model, inputs=[tensor], raw_input_contents=[raw]
    )
    own = None if channel else grpc.insecure_channel(server.grpc_url)
    with own or contextlib.nullcontext():
        return service_pb2_grpc.GRPCInferenceServiceStub(channel or own).ModelInfer(
            request, timeout=PATIENCE
        )


def packed(*texts):
    """Texts as Triton packs them: the length in 4 bytes, then the bytes."""
    raw = [text.encode("utf-8") if isinstance(text, str) else text for text in texts]
    return b"".join(len(text).to_bytes(4, "little") + text for text in raw)


BAD_TENSORS = {
    "wrong name": (dict(raw=packed("a"), name="TEXT"), "INVALID_ARGUMENT", "TEXT"),
    "wrong dtype": (dict(raw=bytes(8), datatype="INT64"), "INVALID_ARGUMENT", "INT64"),
    "wrong shape": (dict(raw=packed("a", "b"), shape=[1, 2]), "INVALID_ARGUMENT", "shape"),
    "empty batch": (dict(raw=b"", shape=[0, 1]), "INVALID_ARGUMENT", ""),
    "65 texts": (dict(raw=packed(*"a" * 65), shape=[65, 1]), "INVALID_ARGUMENT", "<= 64"),
    "unknown model": (dict(raw=packed("a"), model="nope"), "NOT_FOUND", "unknown model"),
    "bad UTF-8": (dict(raw=packed(b"ab\xff")), "INVALID_ARGUMENT", "not valid UTF-8"),
    "length beyond the end": (dict(raw=b"\xff\xff\xff\x7fa"), "INVALID_ARGUMENT", ""),
    "cut length": (dict(raw=b"\1\0"), "INVALID_ARGUMENT", ""),
    "10 MB text": (dict(raw=packed(b"a" * 10_000_000)), "INVALID_ARGUMENT", f"limit is {LIMIT}"),
    "one byte over": (dict(raw=packed(b"a" * (LIMIT + 1))), "INVALID_ARGUMENT", "limit is"),
}


@pytest.mark.parametrize("tensor, status, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_grpc_requests(server, right, tensor, status, message):
    with pytest.raises(grpc.RpcError) as error:
        infer(server, **tensor)
    assert error.value.code().name == status and message in error.value.details()
    right()


def test_bad_utf8_over_http(server, right):
    """In JSON the server itself replaces or refuses it; as binary data the tokenizer refuses."""
    status, reply = post(server, INFER, json_body(data=["X"]).replace(b'"X"', b'"ab\xff"'))
    assert status == 200 or reply["error"]
    tensor = triton_http.InferInput("INPUT", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([["好".encode()], [b"\xe5\xa9"]], dtype=np.object_))
    client = triton_http.InferenceServerClient(server.http_url)
    with pytest.raises(InferenceServerException, match="text 2 of the request is not valid UTF-8"):
        client.infer("seqcls", [tensor])
    client.close()
    right()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("text", [b"\xe5\xa9", "\ud800"])
def test_the_client_refuses_what_is_no_utf8(server, protocol, text):
    with pytest.raises(ClientError, match="text 2 of the request is not valid UTF-8"):
        new_client(server, protocol).classify(["好", text])


def test_clients_that_disconnect(server, right):
    host, port = server.http_url.split(":")
    body = json_body(shape=[64, 1], data=TEXTS[:64])
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head[:20], head, head + body[: len(body) // 2], head + body):
        for _ in range(5):
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
                connection.sendall(sent)
    raw = packed(*TEXTS[:64])
    for _ in range(10):
        with pytest.raises(ClientError, match="Deadline Exceeded"):
            new_client(server, timeout=0.001).classify(TEXTS[:64])
    assert infer(server, raw, shape=[64, 1]).outputs
    right()


def test_bad_requests_among_good_ones(server, right, expected):
    """Sixteen clients at once, four of which send nothing but rubbish."""
    rubbish = itertools.cycle([[b"\xff"], ["a" * (LIMIT + 1)], ["a"] * 65, [TEXTS[0], b"\xff"]])
    problems, refused = [], []

    def good(start, protocol):
        client = new_client(server, protocol)
        for i in range(start, start + 25):
            texts = [TEXTS[(i + k) % len(TEXTS)] for k in range(1 + i % 3)]
            assert_same(client.classify(texts), texts, expected)

    def bad(protocol):
        client = new_client(server, protocol)
        for texts in itertools.islice(rubbish, 25):
            with pytest.raises(ClientError):
                client.classify(texts)
            refused.append(texts)

    def guarded(function, *args):
        try:
            function(*args)
        except BaseException as error:
            problems.append(error)

    work = [(good, 13 * i, PROTOCOLS[i % 2]) for i in range(12)]
    work += [(bad, PROTOCOLS[i % 2]) for i in range(4)]
    threads = [threading.Thread(target=guarded, args=args) for args in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and len(refused) == 100
    right()


def statistics(server, model):
    with triton_server.DIRECT.open(f"http://{server.http_url}/v2/models/{model}/stats") as reply:
        return json.load(reply)["model_stats"][0]


def test_dynamic_batching(server, right, expected):
    """Requests that wait are run together by the model, and each gets its own answer."""
    client, text = triton_grpc.InferenceServerClient(server.grpc_url), TEXTS[0]

    def fewer_runs_than_requests():
        before, answers = statistics(server, "seqcls_model"), {}
        for i in range(200):
            tensor = triton_grpc.InferInput("INPUT", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
            client.async_infer(
                "seqcls", [tensor], lambda result, error, i=i: answers.update({i: error or result})
            )
        wait_until(lambda: len(answers) == 200, server.log)
        for answer in answers.values():
            assert [n.decode() for n in answer.as_numpy("label")[0]] == expected[text][0]
        after = statistics(server, "seqcls_model")
        rows, runs = (after[k] - before[k] for k in ("inference_count", "execution_count"))
        assert rows == 200
        return runs < 150

    # A busy machine may send so slowly that none has to wait; then they are sent again.
    wait_until(fewer_runs_than_requests, server.log)
    client.close()
    right()


# ------------------------------------------------------------------------------------------- fuzz
def random_body(rng):
    """(path, body, headers) near or far from a valid HTTP request."""
    body, headers, path = json_body(data=[rng.choice(TEXTS)]), {}, INFER
    kind = rng.randrange(7)
    if kind == 0:
        body = rng.randbytes(rng.randrange(300))
    elif kind == 1:
        body = body[: rng.randrange(len(body))]
    elif kind == 2:
        body = bytearray(body)
        for _ in range(rng.randrange(1, 9)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        body = bytes(body)
    elif kind == 3:
        values = [None, -1, 2**63, 1e308, "", "x", [], {}, [[["x"]]], True, [1, 1], "BYTES"]
        keys = ("name", "shape", "datatype", "data", "parameters")
        tensor = {key: rng.choice(values) for key in rng.sample(keys, rng.randrange(6))}
        body = json.dumps({"inputs": rng.choice([[tensor], tensor, [tensor] * 3, None])}).encode()
    elif kind == 4:
        headers = {"Inference-Header-Content-Length": str(rng.choice([-1, 0, 1, 5, 10**9, "x"]))}
        body += rng.randbytes(rng.randrange(50))
    elif kind == 5:
        path = f"/v2/{rng.choice(['models', 'repository', 'x'])}/{rng.randrange(99)}/infer"
    else:
        body = b'{"inputs":' + b"[" * rng.randrange(1, 3000)
    return path, body, headers


def random_tensor(rng):
    """Arguments of `infer`: a tensor whose parts fit together or not."""
    texts = []
    for _ in range(rng.randrange(1, 5)):
        text = rng.choice(TEXTS)
        raw = rng.randbytes(rng.randrange(200)) if rng.random() < 0.5 else text.encode()
        texts.append(raw if rng.random() < 0.7 else raw[: rng.randrange(len(raw) + 1)])
    raw, shape = packed(*texts), [len(texts), 1]
    if rng.random() < 0.3:
        raw = raw[: rng.randrange(len(raw) + 1)] + rng.randbytes(rng.randrange(9))
    if rng.random() < 0.3:
        shape = [rng.choice([0, 1, 2, 64, 65, 2**40, -1]) for _ in range(rng.randrange(1, 4))]
    names, datatypes = ["INPUT"] * 8 + ["", "x"], ["BYTES"] * 8 + ["INT64", "FP32", "", "x"]
    return dict(raw=raw, shape=shape, name=rng.choice(names), datatype=rng.choice(datatypes))


def test_fuzz(server, right):
    """600 seeded requests: each gets an answer or an error, nothing hangs or dies."""
    rng, replies = random.Random(SEED), {True: 0, False: 0}
    for i in range(300):
        status, _ = post(server, *random_body(rng))
        assert 200 <= status < 600
        replies[status == 200] += 1
        tensor = random_tensor(rng)
        try:
            infer(server, **tensor)
            replies[True] += 1
        except grpc.RpcError as error:
            assert error.code().name in ("INVALID_ARGUMENT", "INTERNAL", "UNKNOWN"), error
            replies[False] += 1
        if i % 50 == 0:
            right()
    right()
    assert replies[False] > 300 and sum(replies.values()) == 600, replies


# ------------------------------------------------------------------------------ stop and recovery
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sigterm_under_load(real_server, repository, expected, protocol):
    """What has passed the tokenizer is answered, and right; only later requests are refused."""
    texts, lock, gate, stopping = TEXTS[:64], threading.Lock(), threading.Event(), threading.Event()
    begun, answers, refusals = [], [], []  # begun, refusals: was it after the signal?
    with triton_server.TritonServer(repository, ["--drain_seconds", PATIENCE]) as server:

        def ask():
            client = new_client(server, protocol, timeout=PATIENCE)
            while True:
                gate.wait()
                with lock:
                    if not gate.is_set():
                        continue
                    late = stopping.is_set()
                    begun.append(late)
                try:
                    answers.append(client.classify(texts))
                except ClientError as error:
                    refusals.append((late, error))
                    return

        def some_are_under_way():
            """Nothing new is begun, what was begun has passed the tokenizer, not all is done."""
            gate.set()
            count = len(begun)
            wait_until(lambda: len(begun) > count + 16, server.log)
            with lock:
                gate.clear()
            wait_until(lambda: passed_tokenizer() == len(begun), server.log)
            return len(answers) < len(begun)

        def passed_tokenizer():
            return statistics(server, "tokenizer")["inference_stats"]["success"]["count"]

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(some_are_under_way, server.log)
        server.process.terminate()
        stopping.set()
        gate.set()
        assert server.process.wait(PATIENCE) == 0
        for thread in threads:
            thread.join(PATIENCE)
        assert server.processes() == {}
        for url in (server.grpc_url, server.http_url):
            port = int(url.split(":")[1])
            socket.create_server(("127.0.0.1", port)).close()
    assert len(refusals) == 8 and all(late for late, _ in refusals), refusals
    assert len(answers) + 8 == len(begun)
    for answer in answers:
        assert_same(answer, texts, expected)


def test_sigterm_before_clients_that_go_on(real_server, repository):
    """Whoever keeps asking on his connection is told that the server stops, and nothing else."""
    answers, refusals, end = [], set(), threading.Event()
    body = json_body()

    def over_http():
        connection = http.client.HTTPConnection(server.http_url, timeout=PATIENCE)
        while not end.is_set():
            try:
                connection.request("POST", INFER, body)
                reply = connection.getresponse()
                text = reply.read()
                if reply.status == 200:
                    answers.append(reply.status)
                else:
                    refusals.add((reply.status, json.loads(text)["error"]))
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request opens it again

    def over_grpc():
        while not end.is_set():
            try:
                answers.append(infer(server, packed("a"), channel=channel))
            except grpc.RpcError as error:
                refusals.add((error.code().name, error.details().split(":")[0]))

    with triton_server.TritonServer(repository) as server:
        with grpc.insecure_channel(server.grpc_url) as channel:
            threads = [threading.Thread(target=f) for f in (over_http, over_grpc) * 3]
            for thread in threads:
                thread.start()
            try:
                wait_until(lambda: len(answers) > 50, server.log)
                server.process.terminate()
                assert server.process.wait(PATIENCE) == 0, server.log()
            finally:
                end.set()
                for thread in threads:
                    thread.join(PATIENCE)
    stopping = "in ensemble 'seqcls', the server is stopping"
    assert {(503, stopping), ("UNAVAILABLE", stopping)} <= refusals, refusals
    assert {code for code, _ in refusals} == {503, "UNAVAILABLE"}, refusals


def model_process(server, model):
    """The process of a model, or with None that of the server; None if there is none."""
    part = f" {model}_0_0 " if model else "bin/tritonserver --model-repository="
    return next((pid for pid, command in server.processes().items() if part in command), None)


def shared_memory(server):
    """Names of the shared memory of the server's model processes."""
    return set(re.findall(r"\S+_shm_region_\S+", " ".join(server.processes().values())))


@pytest.mark.parametrize("model", ["tokenizer", "seqcls_model", "seqcls_postprocess", None])
def test_killed_process(real_server, repository, expected, model):
    """Requests fail at once, and within seconds the server is back with new processes."""
    with triton_server.TritonServer(repository) as server:
        before, memory = set(server.processes()), shared_memory(server)
        os.kill(model_process(server, model), signal.SIGKILL)
        wait_until(lambda: "; restarting it" in server.log(), server.log)

        def answers():
            with contextlib.suppress(ClientError):
                return new_client(server, timeout=5).classify(TEXTS[:4])

        assert_same(wait_until(answers, server.log), TEXTS[:4], expected)
        assert server.ready() and len(set(server.processes()) & before) == 1  # serve.py
        memory |= shared_memory(server)
        assert server.stop(signal.SIGINT) == 0 and server.processes() == {}
        assert "Traceback" not in server.log()
    assert len(memory) == 6 and not memory & set(os.listdir("/dev/shm"))


def test_killed_serve_leaves_no_process(real_server, repository):
    """Not even one that is stuck and cannot notice by itself that its server is gone."""
    with triton_server.TritonServer(repository) as server:
        for model in serve.MODELS[1:]:
            os.kill(model_process(server, model), signal.SIGSTOP)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: server.processes() == {}, server.processes)


def test_a_server_that_cannot_start(real_server, repository, tmp_path):
    broken = shutil.copytree(repository, tmp_path / "repository")
    (broken / "tokenizer" / "1" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(RuntimeError, match="before it was ready; see its messages above"):
        triton_server.TritonServer(broken)


def test_sigterm_while_it_starts(real_server, repository, monkeypatch):
    monkeypatch.setattr(triton_server.TritonServer, "_wait_until_ready", lambda self: None)
    with triton_server.TritonServer(repository) as server:
        wait_until(lambda: model_process(server, None), server.log)
        assert server.stop() == 0 and server.processes() == {}


SERVE_ERRORS = {  # flags of serve.py, its line on stderr
    "no program": ([], "no-such-program: No such file or directory"),
    "HTTP port taken": (
        ["--http_port", "TAKEN"],
        "cannot listen on 127.0.0.1:TAKEN: Address already in use",
    ),
    "metrics port taken": (
        ["--metrics_port", "TAKEN"],
        "cannot listen on 127.0.0.1:TAKEN: Address already in use",
    ),
    "one port twice": (
        ["--grpc_port", "9", "--metrics_port", "9"],
        "--grpc_port and --metrics_port are both 9; give different ports",
    ),
    "empty repository": (
        ["--model_repository", "."],
        "--model_repository .: seqcls/config.pbtxt is missing; make the folder with "
        "make_repository.py",
    ),
    "short key": (
        ["--admin_key", "secret"],
        "--admin_key: give at least 16 letters, digits, - or _",
    ),
}


@pytest.mark.parametrize("flags, message", SERVE_ERRORS.values(), ids=SERVE_ERRORS)
def test_serve_errors(repository, tmp_path, flags, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = map(str, free_ports(3))
        names = ("--http_port", "--grpc_port", "--metrics_port")
        free = [word for pair in zip(names, ports) for word in pair]
        flags = [flag.replace("TAKEN", port) for flag in flags]
        command = [sys.executable, FOLDER / "serve.py", "--model_repository", repository]
        command += ["--tritonserver", "no-such-program", *free, *flags]
        run = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
    assert (run.returncode, run.stderr) == (2, f"error: {message.replace('TAKEN', port)}\n")


@pytest.mark.parametrize(
    "lacking, message",
    [
        ("package", "no tritonserver; pip install --no-deps nvidia-pytriton==0.7.0"),
        ("library", f"{sys.executable} has no libpython; take a Python built with a shared one"),
        ("stub", "nvidia-pytriton has no model process for Python 3.99; take 3.12"),
    ],
)
def test_local_server_errors(real_server, repository, monkeypatch, lacking, message):
    if lacking == "package":
        monkeypatch.setattr(local_server, "package_folder", lambda: None)
    elif lacking == "library":
        monkeypatch.setattr(local_server.sysconfig, "get_config_var", lambda name: "libpython3.a")
    else:
        monkeypatch.setattr(sys, "version_info", types.SimpleNamespace(major=3, minor=99))
    with pytest.raises(OSError, match=re.escape(message)):
        local_server.main(["--model_repository", str(repository)])


# A server that dies as often as it is told to before it answers, each time by another death.
FAKE_SERVER = """#!{python}
import http.server, json, os, pathlib, signal, sys
starts = pathlib.Path({starts!r})
with starts.open("a") as file:
    file.write("x")
if len(starts.read_text()) <= {deaths}:
    os.kill(os.getpid(), signal.SIGSEGV)
stats = dict(success=dict(count=0), fail=dict(count=0))
models = [dict(name=n, inference_stats=stats) for n in ("seqcls_postprocess", "seqcls_model")]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(model_stats=models)).encode())

port = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--http-port="))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_deaths_before_it_was_seen_ready(repository, tmp_path, deaths):
    """One is no reason to give up: the server may have been ready between two looks."""
    starts, program = tmp_path / "starts", tmp_path / "tritonserver"
    fake = FAKE_SERVER.format(python=sys.executable, starts=str(starts), deaths=deaths)
    program.write_text(fake, encoding="utf-8")
    program.chmod(0o755)
    http_port, grpc_port = map(str, free_ports(2))
    command = [sys.executable, FOLDER / "serve.py", "--model_repository", repository]
    command += ["--tritonserver", program, "--metrics_port", "0"]
    command += ["--http_port", http_port, "--grpc_port", grpc_port]
    log_file = tmp_path / "log.txt"
    with open(log_file, "wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        wait_until(
            lambda: "ready; health" in log_file.read_text() or process.poll() is not None,
            log_file.read_text,
        )
        process.terminate()
        status, log = process.wait(PATIENCE), log_file.read_text()
    finally:
        process.kill()
        process.wait()
    last = "the server ended with exit status -11 before it was ready; see its messages above"
    assert status == (2 if deaths == 3 else 0) and (last in log) == (deaths == 3), log
    assert len(starts.read_text()) == min(deaths + 1, 3)
    assert log.count("; restarting it") == min(deaths, 2)


# ------------------------------------------------------------------ what the server does not do
CLOSED = [  # (method, path) of APIs that a client does not need
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/seqcls/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("GET", "/v2/models/seqcls/trace/setting"),
]


def ask(url, method, path, body=b"", headers=None):
    """(status, content type, body) of one HTTP request on a connection of its own."""
    connection = http.client.HTTPConnection(url, timeout=PATIENCE)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.getheader("Content-Type"), reply.read()
    finally:
        connection.close()


@pytest.mark.parametrize("method, path", CLOSED)
def test_closed_apis_over_http(server, right, method, path):
    status, _, body = ask(server.http_url, method, path, b"{}")
    assert status == 403 and b"This API is restricted" in body
    right()


def closed_calls(stub):
    """Calls of gRPC methods that a client does not need."""
    return [
        (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
        (stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest(model_name="seqcls")),
        (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        (stub.SystemSharedMemoryRegister, service_pb2.SystemSharedMemoryRegisterRequest()),
        (stub.CudaSharedMemoryStatus, service_pb2.CudaSharedMemoryStatusRequest()),
        (stub.LogSettings, service_pb2.LogSettingsRequest()),
        (stub.TraceSetting, service_pb2.TraceSettingRequest()),
    ]


def test_closed_apis_over_grpc(server, right):
    with grpc.insecure_channel(server.grpc_url) as channel:
        for call, request in closed_calls(service_pb2_grpc.GRPCInferenceServiceStub(channel)):
            with pytest.raises(grpc.RpcError, match="This protocol is restricted"):
                call(request, timeout=PATIENCE)
    right()


def test_admin_key_and_addresses(real_server, repository):
    """The key opens the APIs; without further flags only this machine's loopback is listened on."""
    key, (metrics_port,) = "k" * 16, free_ports(1)
    flags = ["--admin_key", key, "--metrics_port", metrics_port]
    with triton_server.TritonServer(repository, flags) as server:
        for path, headers in (("/v2/logging", {}), ("/v2/logging", {"seqcls-admin-key": "x" * 16})):
            assert ask(server.http_url, "GET", path, headers=headers)[0] == 403
        assert ask(server.http_url, "GET", path, headers={"seqcls-admin-key": key})[0] == 200
        with grpc.insecure_channel(server.grpc_url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            header = [("triton-grpc-protocol-seqcls-admin-key", key)]
            index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), metadata=header)
            assert {model.name for model in index.models} == set(serve.MODELS)
        assert b"nv_inference_count" in ask(f"127.0.0.1:{metrics_port}", "GET", "/metrics")[2]
        for url in (server.http_url, server.grpc_url, f":{metrics_port}"):
            with pytest.raises(ConnectionRefusedError):  # it would not be by 0.0.0.0
                socket.create_connection(("127.0.0.2", int(url.split(":")[1])))


# ------------------------------------------------------------------- requests that kill Triton 2.51
def class_count_over_http(url):
    tensor = json.loads(json_body())["inputs"][0]
    outputs = [{"name": "label", "parameters": {"classification": 1}}]
    return ask(url, "POST", INFER, json.dumps({"inputs": [tensor], "outputs": outputs}))


def class_count_over_grpc(url):
    output = service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="label")
    output.parameters["classification"].int64_param = 1
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name="INPUT", datatype="BYTES", shape=[1, 1]
    )
    request = service_pb2.ModelInferRequest(
        model_name="seqcls", inputs=[tensor], outputs=[output], raw_input_contents=[packed("a")]
    )
    with grpc.insecure_channel(url) as channel:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=PATIENCE)


def nested_brackets(url):
    nested = b"[" * 40_000 + b'"a"' + b"]" * 40_000
    return ask(url, "POST", INFER, json_body(data=["X"]).replace(b'"X"', nested))


def one_byte_chunks(url):
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return raw_request(url, head + b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n")


def raw_request(url, data):
    """(status, content type, body) of what is sent as it is; reads the answer while it sends."""
    with socket.create_connection(("127.0.0.1", int(url.split(":")[1])), PATIENCE) as connection:

        def send():
            with contextlib.suppress(OSError):  # the server has closed
                connection.sendall(data)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        reply = http.client.HTTPResponse(connection)
        try:
            reply.begin()
            return reply.status, reply.getheader("Content-Type"), reply.read()
        finally:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join(PATIENCE)


KILLERS = [class_count_over_http, class_count_over_grpc, nested_brackets, one_byte_chunks]


def test_requests_that_kill_the_server(real_server, repository, expected):
    """As the README says of Triton 2.51: without a proxy they end it; serve.py starts it again."""
    with triton_server.TritonServer(repository) as server:
        for number, kill in enumerate(KILLERS, 1):
            url = server.grpc_url if kill is class_count_over_grpc else server.http_url
            with pytest.raises((OSError, http.client.HTTPException, grpc.RpcError)):
                kill(url)
            wait_until(lambda: server.log().count("serve.py: ready") == number + 1, server.log)
            assert server.log().count("; restarting it") == number
        assert_same(new_client(server).classify(TEXTS[:4]), TEXTS[:4], expected)


# ------------------------------------------------------------- behind nginx, with nginx.conf
@pytest.fixture(scope="module")
def nginx():
    """The program; skips, or fails under REQUIRE_SHARED, where it is not installed."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        why = "nginx is not installed (Debian: apt install nginx-light)"
        if os.environ.get("REQUIRE_SHARED"):
            pytest.fail(f"REQUIRE_SHARED is set and {why}")
        pytest.skip(why)
    return program


@pytest.fixture(scope="module")
def proxy(nginx, server):
    with triton_server.Proxy(nginx, server.http_url) as proxy:
        yield proxy


@pytest.mark.parametrize("batch_size", [1, 32, 64])
def test_dev_set_through_the_proxy(proxy, expected, batch_size):
    client = Client(proxy.url, "http")
    client.check_ready()
    for texts in utils.chunks(TEXTS, batch_size):
        assert_same(client.classify(texts), texts, expected)


def request_json(data, outputs=None, **more):
    """A request's body with every key in a place of its own."""
    tensor = {"data": data, "datatype": "BYTES", "name": "INPUT", "shape": [len(data), 1]}
    given = {} if outputs is None else {"outputs": outputs}
    return json.dumps({**given, "inputs": [tensor], **more}, ensure_ascii=False).encode()


GOOD_BODIES = {
    "keys in another order": request_json(["婚后育有一子。", "a"]),
    "rows of one": request_json([["婚后育有一子。"], ["a"]]),
    "one output, an id": request_json(["a"], [{"name": "confidence"}], id="x-1"),
    "JSON outputs": request_json(
        ["a"], [{"name": n, "parameters": {"binary_data": False}} for n in ("label", "confidence")]
    ),
    "much white space": json.dumps(json.loads(request_json(["a"])), indent="\t\r\n ").encode(),
    "brackets, quotes and keys in a text": request_json(['[[[[{"classification": 1}\\', "]]\\"]),
    "64 texts of escapes": request_json(['\\"' * 3000] * 64),
    "no text at all": request_json([""]),
    "a character in two escapes": request_json(["X"]).replace(b"X", rb"\uD83D\uDE00\u5a5a"),
}


@pytest.mark.parametrize("body", GOOD_BODIES.values(), ids=GOOD_BODIES)
def test_good_bodies_through_the_proxy(proxy, server, body):
    """The same answer as without it."""
    status, _, reply = ask(proxy.url, "POST", INFER, body)
    assert status == 200 and reply == ask(server.http_url, "POST", INFER, body)[2]


FORM = "the body is not a request of the form that the README of triton_serving shows"
CLASSIFICATION = [{"name": "label", "parameters": {"classification": 1}}]
BAD_FORMS = {
    "classification": request_json(["a"], CLASSIFICATION),
    "escaped key": request_json(["a"], CLASSIFICATION).replace(b"classif", rb"cl\u0061ssif"),
    "classification beside binary_data": request_json(
        ["a"], [{"name": "label", "parameters": {"binary_data": False, "classification": 1}}]
    ),
    "classification behind a closed string": request_json(["X"]).replace(
        b'"X"', rb'"\\"], "outputs": [{"name": "label", "parameters": {"classification": 1}}'
    ),
    "parameters of the request": request_json(["a"], parameters={"priority": 1}),
    "parameters of the input": request_json(["X"]).replace(
        b'"INPUT"', b'"INPUT", "parameters": {"shared_memory_region": "x"}'
    ),
    "class_count": request_json(["a"], [{"name": "label", "class_count": 1}]),
    "40 000 brackets": request_json(["X"]).replace(b'"X"', b"[" * 40_000 + b"]" * 40_000),
    "40 000 open brackets": b"[" * 40_000,
    "40 000 open braces": b'{"inputs":' * 40_000,
    "brackets with values between": request_json(["X"]).replace(b'"X"', b'["a",' * 9_000),
    "brackets in the shape": request_json(["a"]).replace(b"[1, 1]", b"[" * 9_000),
    "brackets in the id": request_json(["a"], id="X").replace(b'"X"', b"[" * 9_000),
    "3 outputs": request_json(["a"], [{"name": "label"}] * 3),
    "2 inputs": request_json(["a"]).replace(b"}]", b'}, {"name": "INPUT"}]'),
    "another output": request_json(["a"], [{"name": "logits"}]),
    "long shape": request_json(["a"]).replace(b"[1, 1]", b"[1, 1, 1]"),
    "large shape": request_json(["a"]).replace(b"[1, 1]", b"[9999999999, 1]"),
    "negative shape": request_json(["a"]).replace(b"[1, 1]", b"[-1, 1]"),
    "numbers": request_json([1]),
    "something behind it": request_json(["a"]) + b"{}",
    "a comment": b"/**/" + request_json(["a"]),
    "a byte order mark": "\ufeff".encode() + request_json(["a"]),
    "UTF-16": request_json(["a"]).decode().encode("utf-16"),
    "an escape that JSON lacks": request_json(["X"]).replace(b"X", rb"\x41"),
    "half a character": request_json(["X"]).replace(b"X", rb"\ud83d\u0041"),
    "a line end in a text": request_json(["X"]).replace(b"X", b"\n"),
    "cut": request_json(["a"])[:-1],
    "nothing": b"",
    "noise": random.Random(SEED).randbytes(500_000),
    "binary form": packed("a"),
    "a string without end": b'{"inputs": "' + b"\\" * 900_001,
}


@pytest.mark.parametrize("body", BAD_FORMS.values(), ids=BAD_FORMS)
def test_bodies_that_the_proxy_refuses(proxy, right, body):
    status, kind, reply = ask(proxy.url, "POST", INFER, body)
    assert (status, kind, json.loads(reply)) == (400, "application/json", {"error": FORM})
    right()


HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n"
RAW_REQUESTS = {  # bytes as they are, status, error
    "1 000 000 one-byte chunks": (
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 1_000_000,
        411,
        "send Content-Length, no Transfer-Encoding",
    ),
    "two lengths": (
        f"{HEAD}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello".encode(),
        400,
        "malformed HTTP request",
    ),
    "length and chunks": (
        f"{HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),
        400,
        "malformed HTTP request",
    ),
    "negative length": (
        f"{HEAD}Content-Length: -1\r\n\r\n".encode(),
        400,
        "malformed HTTP request",
    ),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, "malformed HTTP request"),
    "a head without end": (
        f"{HEAD}X: {'a' * 50_000}\r\n\r\n".encode(),
        431,
        "the request line or header is too long",
    ),
    "a long path": (
        f"GET /{'a' * 50_000} HTTP/1.1\r\n\r\n".encode(),
        431,
        "the request line or header is too long",
    ),
}


@pytest.mark.parametrize("data, status, error", RAW_REQUESTS.values(), ids=RAW_REQUESTS)
def test_broken_http_at_the_proxy(proxy, right, data, status, error):
    assert raw_request(proxy.url, data) == (
        status,
        "application/json",
        json.dumps({"error": error}).encode(),
    )
    right()


REQUESTS = {  # method, path, body, headers, status, error
    "2 MB": ("POST", INFER, request_json(["a" * 2_000_000]), {}, 413, "1 MB; send fewer texts"),
    "compressed": ("POST", INFER, b"x", {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
    "binary": (
        "POST",
        INFER,
        request_json(["a"]),
        {"Inference-Header-Content-Length": "9"},
        415,
        "send the texts as JSON, without binary data",
    ),
    "a forged verdict": ("POST", INFER, b"{}", {"Body-Is-Right": "yes"}, 400, FORM),
    "GET": ("GET", INFER, b"", {}, 405, "use POST"),
    "POST to health": ("POST", "/v2/health/ready", b"", {}, 405, "use GET"),
    "another model": ("POST", "/v2/models/tokenizer/infer", b"{}", {}, 404, "not found"),
    "a version": ("POST", "/v2/models/seqcls/versions/1/infer", b"{}", {}, 404, "not found"),
    "generate": ("POST", "/v2/models/seqcls/generate", b"{}", {}, 404, "not found"),
    "statistics": ("GET", "/v2/models/stats", b"", {}, 404, "not found"),
    "root": ("GET", "/", b"", {}, 404, "not found"),
    "a way round": ("GET", "/v2/health/ready/../../models/stats", b"", {}, 404, "not found"),
    "an encoded way round": ("GET", "/v2/health/ready%2f..%2f..%2flogging", b"", {}, 404, "not"),
    **{f"{m} {p}": (m, p, b"{}", {}, 404, "not found") for m, p in CLOSED},
}


@pytest.mark.parametrize(
    "method, path, body, headers, status, error", REQUESTS.values(), ids=REQUESTS
)
def test_requests_that_the_proxy_refuses(proxy, right, method, path, body, headers, status, error):
    found, kind, reply = ask(proxy.url, method, path, body, headers)
    assert (found, kind) == (status, "application/json") and error in json.loads(reply)["error"]
    right()


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models/seqcls/ready"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_through_the_proxy(proxy, method, path):
    assert ask(proxy.url, method, path)[0] == 200
    assert ask(proxy.url, method, f"{path}?x=1", b"x" * 100)[0] == 200


def test_triton_answers_for_what_has_the_form(proxy, right):
    """The proxy does not repeat the server's checks of numbers and lengths."""
    good, name = request_json(["a"]), b'"name": "INPUT"'
    rest = b'"datatype": "BYTES", "name": "INPUT", "shape": [1, 1]'
    for body, message in (
        (request_json(["a"] * 65), "must be <= 64"),
        (request_json(["a"]).replace(b"[1, 1]", b"[3, 1]"), "expected 3 string elements"),
        (request_json(["a" * (LIMIT + 1)]), f"the limit is {LIMIT}"),
        (good.replace(rest, ", ".join([name.decode()] * 3).encode()), ""),
        (good.replace(name, b'"data": ["b"]'), ""),
        (b'{"id": "x"}', ""),
        (b'{"outputs": [{"name": "label"}]}', ""),
    ):
        status, _, reply = ask(proxy.url, "POST", INFER, body)
        assert status in (400, 500) and message in json.loads(reply)["error"], reply
    assert ask(proxy.url, "POST", INFER, b"{%b, %b}" % (good[1:-1], good[1:-1]))[0] == 200
    right()


def test_fuzz_through_the_proxy(proxy, right, expected):
    """1000 hostile requests, good ones among them: no death, no wrong answer."""
    rng, statuses = random.Random(SEED), set()
    client, hostile = Client(proxy.url, "http"), [*BAD_FORMS.values(), *GOOD_BODIES.values()]
    for i in range(1000):
        path, body, headers = random_body(rng)
        if i % 3 == 0:  # a known one with some bytes changed
            body = bytearray(rng.choice(hostile)[:20_000] or b"x")
            for _ in range(rng.randrange(4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            path, body, headers = INFER, bytes(body), {}
        statuses.add(ask(proxy.url, "POST", path, body, headers)[0])
        if i % 20 == 0:
            texts = [TEXTS[(i + k) % len(TEXTS)] for k in range(1 + i % 5)]
            assert_same(client.classify(texts), texts, expected)
    assert statuses <= {200, 400, 404, 415} and {200, 400, 404} <= statuses
    right()


def test_slow_clients_at_the_proxy(proxy, right):
    """300 that do not finish their head or their body: everyone else is served meanwhile."""
    port = int(proxy.url.split(":")[1])
    starts = [f"{HEAD}Content-Length: 100\r\n\r\n".encode() + b"{", HEAD.encode()[:20]]
    with contextlib.ExitStack() as stack:
        slow = []
        for i in range(300):
            connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
            stack.enter_context(connection)
            # Bodies of at most half of the requests that one address may have at once.
            connection.sendall(starts[0 if i < 32 else 1])
            slow.append(connection)
        assert ask(proxy.url, "GET", "/v2/health/ready")[0] == 200
        assert len(Client(proxy.url, "http").classify(TEXTS[:4])) == 4
        for connection in slow:  # in the end each gets an answer or is cut off
            with contextlib.suppress(ConnectionResetError):
                reply = connection.recv(1000)
                assert reply == b"" or b"408" in reply.split(b"\r\n")[0]
    right()


def test_too_many_requests_at_the_proxy(proxy, right):
    """The 65th body that one address sends at the same time gets 503; health checks go on."""
    port = int(proxy.url.split(":")[1])
    with contextlib.ExitStack() as stack:

        def begin_a_body():
            connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
            stack.enter_context(connection)
            connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n".encode() + b"{")

        def refused():
            return ask(proxy.url, "POST", INFER, request_json(["a"]))[0::2]

        for _ in range(64):
            begin_a_body()
        # nginx may still count bodies of clients that are gone, and has then refused some of these.
        full = wait_until(
            lambda: (r := refused())[0] == 503 and r or begin_a_body(), lambda: "never full"
        )
        assert json.loads(full[1]) == {"error": "too many requests at once; retry later"}
        assert ask(proxy.url, "GET", "/v2/health/ready")[0] == 200
    wait_until(lambda: refused()[0] == 200, lambda: "the places are not given back")
    right()


def test_sigterm_behind_the_proxy(nginx, real_server, repository, expected):
    """Clients on connections that stay open get a right answer or 503, nothing else."""
    answers, refusals, end = [], set(), threading.Event()
    texts = TEXTS[:8]
    body = request_json(texts)

    def go_on():
        connection = http.client.HTTPConnection(proxy.url, timeout=PATIENCE)
        while not end.is_set():
            connection.request("POST", INFER, body)
            reply = connection.getresponse()
            text = reply.read()
            if reply.status == 200:
                answers.append(text)
            else:
                refusals.add((reply.status, json.loads(text)["error"]))

    with (
        triton_server.TritonServer(repository) as server,
        triton_server.Proxy(nginx, server.http_url) as proxy,
        futures.ThreadPoolExecutor(8) as pool,
    ):
        clients = [pool.submit(go_on) for _ in range(8)]
        try:
            wait_until(lambda: len(answers) > 50, server.log)
            assert server.stop() == 0
            assert ask(proxy.url, "GET", "/v2/health/ready")[0] == 503
        finally:
            end.set()
        for client in clients:
            client.result(PATIENCE)
    stopping = "in ensemble 'seqcls', the server is stopping"
    gone = "the server is not available; retry later"
    assert (503, stopping) in refusals and refusals <= {(503, stopping), (503, gone)}
    tensors = {tensor["name"]: tensor for tensor in json.loads(answers[0])["outputs"]}
    names = tensors["label"]["data"]
    assert [n for n in names if n] == [n for text in texts for n in expected[text][0]]
    assert len(set(answers)) == 1
