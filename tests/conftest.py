"""Fixtures: the tiny model, a trained checkpoint, the shared real data where it is at hand."""

import zlib  # noqa: F401  before anything loads paddle, see platform notes in train.py
import importlib.util
import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ["", "analysis", "data", "benchmarks"]
FOLDERS += [f"deploy/{name}" for name in ("predictor", "paddle_serving", "triton_serving")]
sys.path[:0] = [str(REPO / folder) for folder in FOLDERS]

import utils  # noqa: E402

SAMPLE = REPO / "data"


def needs_package(name):
    """For a whole test file: skips it on a machine without the servers' packages."""
    if importlib.util.find_spec(name) is None:
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
def small_data(tmp_path_factory):
    """The first lines of the sample: 96 train, 40 dev, 10 texts to predict."""
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    for name, lines in (("train", 96), ("dev", 40), ("data", 10), ("label", 20)):
        text = (SAMPLE / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.txt").write_text("".join(text[:lines]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory):
    """The tiny model trained on the whole sample as `make demo` does it."""
    import train

    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    train.main(
        f"--device cpu --dataset_dir {SAMPLE} --model_name {tiny_model} --save_dir {folder} "
        "--epochs 12 --batch_size 8 --learning_rate 1e-3 --dropout 0 --warmup --warmup_steps 100 "
        "--max_grad_norm 1 --logging_steps 50".split()
    )
    return folder


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory):
    """The exported checkpoint with its ONNX file; tests that change it take a copy."""
    import export_model

    folder = tmp_path_factory.mktemp("exported") / "export"
    export_model.main(["--params_path", str(checkpoint), "--output_path", str(folder), "--onnx"])
    return folder


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
