"""Other places: another Paddle, another Python, another locale, Windows; what starts and how fast.

OTHER_PADDLE names the Python of an environment with the other Paddle, PREDICTOR_PYTHON that of one
with deploy/predictor/requirements.txt alone; CI has both.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import convert
import numpy as np
import predictor
import pytest
from conftest import GRAPH_FILES, PADDLE_3, REPO, SAMPLE, needs_environment

import export_model
import model as models
import predict
import utils

NAME = "模型"  # of a folder
GBK = {"LC_ALL": "zh_CN.GBK"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*command, **settings):
    """A finished process; its environment gets the settings."""
    env = {**os.environ, **settings}
    return subprocess.run([*map(os.fspath, command)], capture_output=True, cwd=REPO, env=env)


def ok(*command, **settings):
    result = run(sys.executable, *command, **settings)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    return result


def rows_of(path):
    return [line.split("\t") for line in path.read_text("utf-8").splitlines()]


def assert_same(found, expected):
    """The same texts and labels, and scores within 1e-5."""
    found, expected = rows_of(found), rows_of(expected)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(found) > 1
    scores = [[row[2:] for row in rows[1:]] for rows in (found, expected)]
    np.testing.assert_allclose(*(np.array(s, dtype=float) for s in scores), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def sample_scores(checkpoint, tmp_path_factory):
    """(data folder with the 2 400 texts of the sample, what predict.py writes for them)."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [*utils.read_texts(SAMPLE / "train.txt"), *utils.read_texts(SAMPLE / "dev.txt")]
    texts = "".join(line.split("\t")[0] + "\n" for line in lines)
    (folder / "data.txt").write_text(texts, encoding="utf-8")
    flags = ["--device", "cpu", "--dataset_dir", folder, "--params_path", checkpoint]
    flags += ["--output_scores", "--output_file", folder / "expected.txt"]
    predict.main([str(flag) for flag in flags])
    return folder, folder / "expected.txt"


# -------------------------------------------------------------------------------- another Paddle
def test_a_checkpoint_of_the_other_paddle(checkpoint, sample_scores, tmp_path):
    """Both ways: each Paddle trains a model, labels the other's, exports the other's."""
    other = needs_environment("OTHER_PADDLE")
    folder, expected = sample_scores
    data = ["--device", "cpu", "--dataset_dir", folder, "--output_scores"]
    found = run(
        *(other, "predict.py", *data, "--params_path", checkpoint, "--output_file"),
        tmp_path / "found.txt",
    )
    assert found.returncode == 0, found.stderr
    assert_same(tmp_path / "found.txt", expected)
    train = ["train.py", "--device", "cpu", "--dataset_dir", SAMPLE, "--model_name", checkpoint]
    train += ["--save_dir", tmp_path / "theirs", "--epochs", "1", "--init_from_ckpt"]
    trained = run(other, *train, checkpoint / utils.WEIGHTS_FILE)
    assert trained.returncode == 0, trained.stderr
    outputs = []
    for python in (sys.executable, other):
        outputs.append(tmp_path / f"{len(outputs)}.txt")
        flags = [*data, "--params_path", tmp_path / "theirs", "--output_file", outputs[-1]]
        assert run(python, "predict.py", *flags).returncode == 0
    assert_same(*outputs)


def test_a_bundle_of_the_other_paddle(checkpoint, sample_scores, tmp_path):
    """Its ONNX model is any Paddle's, the graph of Paddle 2 is Paddle 3's as well; exporting anew
    leaves no graph of the other."""
    other = needs_environment("OTHER_PADDLE")
    folder, expected = sample_scores
    target = tmp_path / "export"
    flags = ["--params_path", checkpoint, "--output_path", target]
    exported = run(other, "export_model.py", *flags, "--onnx")
    assert exported.returncode == 0, exported.stderr
    infer = ["deploy/predictor/infer.py", "--device", "cpu", "--dataset_dir", folder]
    infer += ["--model_path_prefix", target / "float32", "--output_scores", "--output_file"]
    ok(*infer, tmp_path / "found.txt")
    assert_same(tmp_path / "found.txt", expected)
    if not PADDLE_3:
        with pytest.raises(utils.UserError, match=r"float32.json: written by Paddle 3, which Padd"):
            models.static_forward(target / "float32")
        (target / "model.onnx").unlink()
        broken = run(sys.executable, *infer, tmp_path / "found.txt")
        assert broken.returncode == 2
        assert b"error: float32.json: written by Paddle 3, which paddle2onnx 1" in broken.stderr
    export_model.main([str(flag) for flag in flags])
    if not PADDLE_3:
        code = "import json, sys, utils, model; batch = utils.pad(json.loads(sys.argv[2]))\n"
        code += "print(json.dumps(model.static_forward(sys.argv[1])(**batch).tolist()))"
        sequences = [list(range(1, 9)), list(range(1, 30))]
        theirs = run(other, "-c", code, target / "float32", json.dumps(sequences))
        assert theirs.returncode == 0, theirs.stderr
        ours = models.static_forward(target / "float32")(**utils.pad(sequences))
        np.testing.assert_allclose(json.loads(theirs.stdout), ours, rtol=0, atol=1e-4)
    assert GRAPH_FILES == {f.name for f in target.glob("float32*")}
    assert not (target / "model.onnx").exists()


def test_paddle_serving_takes_no_graph_of_paddle_3(checkpoint, tmp_path, run_cli):
    export_model.main(["--params_path", str(checkpoint), "--output_path", str(tmp_path / "e")])
    if not PADDLE_3:  # what one looks like
        (tmp_path / "e" / "float32.pdmodel").rename(tmp_path / "e" / "float32.json")
    targets = ["--serving_server", tmp_path / "s", "--serving_client", tmp_path / "c"]
    status, error = run_cli(convert.main, ["--dirname", tmp_path / "e", *targets])
    assert status == 2 and "float32.json: written by Paddle 3, which Paddle Serving cannot" in error
    assert not (tmp_path / "s").exists() and not (tmp_path / "c").exists()


# -------------------------------------------------------------------------------- another Python
def test_predictor_alone(bundle, sample_scores, tmp_path):
    """With its own requirements, on another Python: fp32, int8, speed, one error."""
    python = needs_environment("PREDICTOR_PYTHON")
    folder, expected = sample_scores
    shutil.copytree(bundle, tmp_path / "export")
    flags = ["--device", "cpu", "--model_path_prefix", tmp_path / "export" / "float32"]
    infer = [python, "deploy/predictor/infer.py", *flags]
    write = ["--dataset_dir", folder, "--output_scores", "--output_file"]
    result = run(*infer, *write, tmp_path / "found.txt")
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "found.txt", expected)
    result = run(*infer, *write, tmp_path / "int8.txt", "--use_quantize")
    assert result.returncode == 0, result.stderr
    pairs = list(zip(rows_of(tmp_path / "int8.txt"), rows_of(expected), strict=True))
    assert sum(a[:2] == b[:2] for a, b in pairs) > 0.99 * len(pairs)
    result = run(*infer, "--dataset_dir", SAMPLE, "--perf")
    assert b"micro f1: 9" in result.stdout, result.stderr
    result = run(*infer, "--dataset_dir", SAMPLE, "--data_file", "no.txt")
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1


def test_no_converter_for_this_python(bundle, tmp_path, run_cli, monkeypatch):
    import infer

    shutil.copytree(bundle, tmp_path / "export")
    (tmp_path / "export" / "model.onnx").unlink()
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    monkeypatch.setattr(predictor, "PYTHON", (3, 13))
    flags = ["--device", "cpu", "--model_path_prefix", tmp_path / "export" / "float32"]
    status, error = run_cli(infer.main, [*flags, "--dataset_dir", SAMPLE])
    assert status == 2 and error.endswith(
        "paddle2onnx, which has no release for Python 3.13; run export_model.py --onnx on the "
        "checkpoint with Python 3.12, and take that bundle\n"
    )


WINDOWS = """import os, runpy, sys
sys.modules.update(dict.fromkeys("fcntl pwd grp resource termios".split()))  # cannot be imported
import ctypes, signal
for module, names in ((os, "fork setsid killpg sched_getaffinity mkfifo geteuid".split()),
                      (signal, "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGPIPE setitimer".split())):
    for name in names:
        delattr(module, name)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_windows(*command):
    """A script where the modules and functions are missing that Windows does not have."""
    # filelock warns where there is neither fcntl nor, on Windows, msvcrt.
    return run(sys.executable, "-W", "ignore::UserWarning", "-c", WINDOWS, *command)


def test_what_windows_does_not_have(bundle, sample_scores, tmp_path):
    """An imitation: nothing was run on Windows."""
    folder, expected = sample_scores
    flags = ["--device", "cpu", "--model_path_prefix", bundle / "float32", "--output_scores"]
    output = ["--dataset_dir", folder, "--output_file", tmp_path / "found.txt"]
    result = on_windows("deploy/predictor/infer.py", *flags, *output)
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "found.txt", expected)
    checked = on_windows("data/check.py", "--dataset_dir", SAMPLE, "--output_dir", tmp_path / "c")
    assert checked.returncode == 0, checked.stderr
    for script in ("deploy/paddle_serving/http_client.py", "data/doccano.py", "train.py"):
        assert b"usage:" in on_windows(script, "--help").stdout


def test_servers_say_that_they_need_linux(tmp_path):
    for script in ("deploy/paddle_serving/service.py", "deploy/triton_serving/serve.py"):
        result = on_windows(script)
        message = (
            "error: this server needs Linux; on Windows use WSL or Docker, or deploy/predictor"
        )
        assert (result.returncode, result.stderr.decode()) == (2, message + os.linesep)


# -------------------------------------------------------------------------------- another locale
@pytest.fixture(scope="module", params=["GBK", "ASCII"])
def locale(request, tmp_path_factory):
    """(settings of a locale, its name for a folder called NAME)"""
    if request.param == "ASCII":
        return ASCII, NAME.encode()
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "zh_CN", "-f", "GBK", folder / "zh_CN.GBK"]
    made = shutil.which("localedef") and subprocess.run(command, capture_output=True)
    if not (folder / "zh_CN.GBK").exists():
        reason = f"no GBK locale can be made ({made and made.stderr.decode().strip()})"
        if os.environ.get("REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return {**GBK, "LOCPATH": str(folder)}, NAME.encode("gbk")


def test_chinese_paths(locale, checkpoint, small_data, tmp_path):
    """Each script reads and writes folders whose name is not UTF-8, or not the locale's."""
    settings, name = locale
    root = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(root)
    data, model, export = (os.path.join(root, part) for part in (b"data", b"model", b"export"))
    shutil.copytree(os.fsencode(small_data), data)
    shutil.copytree(os.fsencode(checkpoint), model)

    def script(path, *flags):
        parts = [os.path.join(root, f) if isinstance(f, bytes) else os.fsencode(f) for f in flags]
        result = subprocess.run(
            [os.fsencode(sys.executable), os.fsencode(REPO / path), *parts],
            capture_output=True,
            env={**os.environ, **settings},
        )
        assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
        return result

    script("data/check.py", "--dataset_dir", b"data", "--output_dir", b"check")
    cpu = ["--device", "cpu", "--dataset_dir", b"data"]
    script("train.py", *cpu, "--model_name", b"model", "--save_dir", b"saved", "--epochs", "1")
    script("predict.py", *cpu, "--params_path", b"model", "--output_file", b"predicted.txt")
    onnx = [] if sys.version_info >= (3, 13) else ["--onnx"]
    script("export_model.py", "--params_path", b"model", "--output_path", b"export", *onnx)
    if onnx:
        infer = ["deploy/predictor/infer.py", *cpu, "--model_path_prefix", b"export/float32"]
        script(*infer, "--output_file", b"labelled.txt", "--use_quantize")
        assert "labels: " in script(*infer).stdout.decode("gbk", "replace")
    prune = ["prune.py", *cpu, "--params_dir", b"model", "--output_dir", b"pruned"]
    script(*prune, "--width_mult", "1/2", "--max_steps", "2")
    report = ["--report_path", b"report.html", "--json_path", b"report.json", "--bad_case_path"]
    script("analysis/evaluate.py", *cpu, "--params_path", b"model", *report, b"bad.txt")
    with open(os.path.join(root, b"report.html"), encoding="utf-8") as file:
        assert NAME in file.read()
    assert os.listdir(tmp_path) == [os.fsdecode(name)]  # no folder under a misread name
    made = {"check", "data", "export", "model", "pruned", "report.html", "report.json", "saved"}
    made |= {"bad.txt", "predicted.txt"} | ({"labelled.txt"} if onnx else set())
    assert {os.fsdecode(file) for file in os.listdir(root)} == made
    assert os.path.exists(os.path.join(export, b"float32.pdiparams"))


# ------------------------------------------------------------------------------------------ start
def test_one_text_needs_no_package_that_is_not_used(checkpoint, tmp_path):
    """Neither pandas nor data sets, which paddlenlp/__init__.py imports, nor a word on stderr."""
    (tmp_path / "data.txt").write_text("婚后生育一子。\n", encoding="utf-8")
    code = "import atexit, runpy, sys\n"
    code += "atexit.register(lambda: print(*sys.modules))\n"
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--device", "cpu", "--dataset_dir", tmp_path, "--params_path", checkpoint]
    result = ok("-c", code, "predict.py", *flags, "--output_file", tmp_path / "o.txt")
    loaded = {name.split(".")[0] for name in result.stdout.decode().split()}
    assert loaded & {"paddle", "paddlenlp"} == {"paddle", "paddlenlp"}
    assert not loaded & {"datasets", "pandas", "pyarrow", "sklearn", "matplotlib", "paddleslim"}
    line = rf"\[[-0-9 :,]+\] \[    INFO\] - Prediction results save in {tmp_path}/o.txt.\n"
    assert re.fullmatch(line, result.stderr.decode()), result.stderr


@pytest.mark.parametrize("script", ["train.py", "predict.py", "export_model.py", "prune.py"])
def test_help_is_quick(script):
    """Against an empty Python, so that a slow machine does not count."""

    def seconds(*command):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(sys.executable, *command)
            times.append(time.perf_counter() - start)
        return min(times)

    empty = seconds("-c", "import numpy, tokenizers, tqdm, filelock")
    assert seconds(script, "--help") < 5 * empty


def test_make_names_the_python_that_it_takes(tmp_path):
    """The newest for Paddle 2, else one for Paddle 3; a version that none supports is an error."""
    for version in ("3.9", "3.10", "3.12", "3.13"):
        path = tmp_path / f"python{version}"
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)

    def choice(*versions, flags=()):
        folder = tmp_path / "-".join(versions)
        folder.mkdir(exist_ok=True)
        for version in versions:
            shutil.copy(tmp_path / f"python{version}", folder)
        for tool in ("sh", "make", "echo", "test"):
            if not (folder / tool).exists():
                (folder / tool).symlink_to(shutil.which(tool))
        command = ["make", "-n", "demo", f"VENV={tmp_path}/venv", *flags]
        made = run(*command, PATH=str(folder))
        return re.findall(rb"^(\S*python\S*) -m venv|(requirements\S*\.txt)$", made.stdout, re.M)

    def names(found):
        return [(a or b).decode() for a, b in found]

    assert names(choice("3.9", "3.10", "3.12", "3.13")) == ["python3.12", "requirements.txt"]
    assert names(choice("3.9", "3.10")) == ["python3.10", "requirements.txt"]
    third = ["requirements-paddle3.txt", "requirements-paddle3-no-deps.txt"]
    assert names(choice("3.9", "3.13")) == ["python3.13", *third]
    assert names(choice("3.12", flags=["PADDLE=3"])) == ["python3.12", *third]


def test_requirements_of_gpus_are_those_of_the_cpu():
    """Names and versions, but for Paddle and ONNX Runtime."""

    def names(path):
        lines = (REPO / path).read_text("utf-8").splitlines()
        return {re.split(r"[=<>; #]", line)[0] for line in lines if line[:1].isalpha()}

    special = {"paddlepaddle", "paddlepaddle-gpu", "onnxruntime", "onnxruntime-gpu"}
    for line in ("", "-paddle3"):
        cpu, gpu = names(f"requirements{line}.txt"), names(f"requirements{line}-gpu.txt")
        assert cpu - special == gpu - special and "onnxruntime-gpu" in gpu
        assert f"-c requirements{line}.txt" in (REPO / f"requirements{line}-gpu.txt").read_text()
