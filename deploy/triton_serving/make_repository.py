"""Make a complete Triton model repository from an exported bundle.

    python make_repository.py --model_path_prefix ../../export/float32 --output_dir model_repository

Labels, sequence length, thresholds, how many labels a text may have, tokenizer and ONNX file come
from the bundle; the server then needs neither the bundle nor this project. The folder appears whole
or not at all; an older repository stays in place until the new one is complete.
"""

import contextlib
import fcntl
import json
import os
import shutil
import string
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent / "predictor"), str(FOLDER.parent.parent)]
from predictor import bundle_folder, open_session  # noqa: E402

import metric  # noqa: E402
import utils  # noqa: E402
from utils import UserError, at_least, logger  # noqa: E402

TEMPLATES = FOLDER / "models"
MODELS = {"seqcls", "seqcls_model", "seqcls_postprocess", "tokenizer"}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    prefix = "path of the static graph without its suffix"
    add("--model_path_prefix", default="export/float32", help=prefix)
    add("--output_dir", default="model_repository", help="folder of the repository")
    add("--precision", choices=list(utils.ONNX_FILES), default="fp32", help="of the served model")
    add("--device", choices=["cpu", "gpu"], default="cpu", help="where the model runs")
    longest = "a longer text gets an error, whatever its length in tokens"
    add("--max_text_bytes", type=at_least(1), default=100_000, help=longest)
    args = parser.parse_args(argv)
    if args.precision == "fp16" and args.device != "gpu":
        raise UserError("--precision fp16 needs --device gpu; on the CPU use int8")
    if args.precision == "int8" and args.device != "cpu":
        raise UserError("--precision int8 needs --device cpu; on the GPU use fp16")
    return args


def fill(folder, args):
    """Writes the repository into an empty folder. Raises UserError if the bundle is broken."""
    bundle = bundle_folder(args.model_path_prefix)
    info = utils.read_model_info(bundle)
    utils.check_length(info.max_seq_length, info.max_position)
    tokenizer = utils.load_tokenizer(bundle)
    # The CPU loads the ONNX file of every precision; this checks that it is of this bundle.
    open_session(args.model_path_prefix, args.precision, device="cpu")
    ignored = shutil.ignore_patterns(".gitkeep", "__pycache__")
    shutil.copytree(TEMPLATES, folder, ignore=ignored, dirs_exist_ok=True)
    values = {"num_labels": len(info.labels), "instance_kind": f"KIND_{args.device.upper()}"}
    for path in folder.glob("*/config.pbtxt"):
        path.write_text(string.Template(path.read_text()).substitute(values))
    onnx_file = bundle / utils.ONNX_FILES[args.precision]
    shutil.copyfile(onnx_file, folder / "seqcls_model" / "1" / "model.onnx")
    tokenizer.save(str(folder / "tokenizer" / "1" / "tokenizer.json"), pretty=False)
    limits = {"max_seq_length": info.max_seq_length, "max_text_bytes": args.max_text_bytes}
    write_json(folder / "tokenizer" / "1" / "settings.json", limits)
    thresholds = info.thresholds or [metric.DEFAULT_THRESHOLD] * len(info.labels)
    rule = {"labels": info.labels, "thresholds": thresholds, **info.limits}
    write_json(folder / "seqcls_postprocess" / "1" / "settings.json", rule)


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def check_replaceable(path):
    """Only a repository that this script made may be replaced, or an empty folder."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: it is a file; give a folder")
    if path.is_dir() and (others := {entry.name for entry in path.iterdir()} - MODELS):
        raise UserError(
            f"--output_dir {path}: holds {min(others)}, which is no part of this repository; give "
            "a folder of its own"
        )


@contextlib.contextmanager
def new_folder(path):
    """`with new_folder(path) as temporary`: the folder, with all below it, takes the place of
    `path` when the block ends; if it fails, `path` is as before. Raises UserError."""
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    temporary, old = (path.with_name(f".{path.name}.{which}.tmp") for which in ("new", "old"))
    parent = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(path.parent, os.O_RDONLY)
        fcntl.flock(parent, fcntl.LOCK_EX)  # a second process waits for the first
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        if old.exists() and not path.exists():  # it was killed between the two renames
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            utils.fsync(file)
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        os.fsync(parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; nothing was replaced") from error
    finally:
        if parent is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(parent)


def main(argv=None):
    args = parse_args(argv)
    with new_folder(args.output_dir) as folder:
        fill(folder, args)
    logger.info(
        "Model repository in %s: tritonserver --model-repository=%s", *[args.output_dir] * 2
    )


if __name__ == "__main__":
    utils.cli(main)
