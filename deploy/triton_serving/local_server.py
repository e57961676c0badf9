"""Run Triton without Docker: serve.py with the tritonserver of the PyPI package nvidia-pytriton.

    pip install -r requirements-local.txt
    pip install --no-deps nvidia-pytriton==0.7.0
    python local_server.py --model_repository model_repository

Takes the flags of serve.py. For Linux on x86-64, Python 3.10 to 3.12, CPU only: the package has no
onnxruntime backend, so onnxruntime_backend.py takes its place. For trying things and for tests; a
public service needs a newer Triton, see the README.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import serve

HERE = Path(__file__).resolve().parent


def main(argv=None):
    args = serve.parse_args(argv)
    package = package_folder()
    if package is None:
        raise OSError("no tritonserver; pip install --no-deps nvidia-pytriton==0.7.0")
    with tempfile.TemporaryDirectory(prefix="triton_backends_") as folder:
        make_backends(package, Path(folder))
        # The model processes load the library of this Python; without it the start hangs.
        libraries = [package.parent.parent / "nvidia_pytriton.libs", library_folder()]
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        args.tritonserver = package / "bin" / "tritonserver"
        args.flags = [f"--backend-directory={folder}", *args.flags]
        args.model_repository = os.path.abspath(args.model_repository)
        os.chdir(folder)  # a model.py in the current folder would be taken for the backend's
        return serve.run(args)


def package_folder():
    """The folder of the server in nvidia-pytriton; None if the package is not installed."""
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent / "tritonserver" if spec else None


def library_folder():
    """Where libpython is. Raises OSError for a Python without it."""
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    name = sysconfig.get_config_var("INSTSONAME") or ""
    if not name.startswith("libpython") or ".so" not in name:
        raise OSError(f"{sys.executable} has no libpython; take a Python built with a shared one")
    return folder


def make_backends(package, folder):
    """Fills Triton's backend folder: python, with the program for this Python, and onnxruntime."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise OSError(f"nvidia-pytriton has no model process for Python {version}; take 3.12")
    shutil.copytree(package / "backends" / "python", folder / "python")
    shutil.copy(stub, folder / "python")
    (folder / "onnxruntime").mkdir()
    shutil.copy(HERE / "onnxruntime_backend.py", folder / "onnxruntime" / "model.py")


if __name__ == "__main__":
    serve.cli(main)
