"""Make a complete Triton model repository from an exported bundle.

    python make_repository.py --model_path_prefix ../../export/float32 --output_dir model_repository

Labels, sequence length, thresholds, how many labels a text may have, tokenizer and ONNX file come
from the bundle; the server then needs neither the bundle nor this project. The folder appears whole
or not at all; an older repository stays in place until the new one is complete.
"""

import contextlib
import json
import os
import shutil
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "predictor"))
import metric
import utils
from utils import UserError, at_least, logger

predictor = utils.LazyModule("predictor")
TEMPLATES = Path(__file__).resolve().parent / "models"
MODELS = {"seqcls", "seqcls_model", "seqcls_postprocess", "tokenizer"}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--model_path_prefix", default="export/float32", help="static graph without its suffix")
    add("--output_dir", default="model_repository", help="folder of the repository")
    add("--precision", choices=list(utils.ONNX_FILES), default="fp32", help="of the served model")
    add("--device", choices=["cpu", "gpu"], default="cpu", help="where the model runs")
    add("--max_text_bytes", type=at_least(1), default=100_000, help="longer texts get an error")
    args = parser.parse_args(argv)
    if args.precision == "fp16" and args.device != "gpu":
        raise UserError("--precision fp16 needs --device gpu; on the CPU use int8")
    if args.precision == "int8" and args.device != "cpu":
        raise UserError("--precision int8 needs --device cpu; on the GPU use fp16")
    return args


def main(argv=None):
    args = parse_args(argv)
    bundle, path = predictor.bundle_folder(args.model_path_prefix), Path(args.output_dir)
    check_replaceable(path, bundle)
    with new_folder(path) as folder:
        fill(folder, bundle, args)
    logger.info("Model repository in %s: tritonserver --model-repository=%s", path, path)


def check_replaceable(path, bundle):
    """Only a repository that this script made may be replaced, or an empty folder."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: it is a file; give a folder")
    real = path.resolve()
    if bundle.resolve().is_relative_to(real) or TEMPLATES in (real, *real.parents):
        raise UserError(
            f"--output_dir {path}: would replace the bundle or the templates, which are read; give "
            "another folder"
        )
    if path.is_dir() and (others := {entry.name for entry in path.iterdir()} - MODELS):
        raise UserError(
            f"--output_dir {path}: holds {min(others)}, which is no part of this repository; give "
            "a folder of its own"
        )


@contextlib.contextmanager
def new_folder(path):
    """`with new_folder(path) as temporary`: the folder takes the place of `path` when the block
    ends; if it fails, `path` is as before. Raises UserError."""
    path = Path(os.path.realpath(path))
    temporary, old = (path.with_name(f".{path.name}.{which}.tmp") for which in ("new", "old"))

    def clean_up():  # also after a killed process, which may have got as far as the first rename
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with utils.folder_lock(path.parent):  # a second process waits for the first
            clean_up()
            try:
                temporary.mkdir()
                yield temporary
                for file in [*temporary.rglob("*"), temporary]:
                    utils.fsync(file)
                if path.exists():
                    os.rename(path, old)
                os.rename(temporary, path)
                utils.fsync(path.parent)
            finally:
                clean_up()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; nothing was replaced") from error


def fill(folder, bundle, args):
    """Writes the repository into an empty folder. Raises UserError if the bundle is broken."""
    info = utils.read_model_info(bundle).with_settings()  # checks the length
    tokenizer = utils.load_tokenizer(bundle)
    # The CPU loads the ONNX file of every precision; this checks that it is of this bundle.
    predictor.open_session(args.model_path_prefix, args.precision, device="cpu")
    ignored = shutil.ignore_patterns(".gitkeep", "__pycache__")
    shutil.copytree(TEMPLATES, folder, ignore=ignored, dirs_exist_ok=True)
    values = {"num_labels": len(info.labels), "instance_kind": f"KIND_{args.device.upper()}"}
    for path in folder.glob("*/config.pbtxt"):
        path.write_text(string.Template(path.read_text()).substitute(values))
    onnx_file = bundle / utils.ONNX_FILES[args.precision]
    shutil.copyfile(onnx_file, folder / "seqcls_model" / "1" / "model.onnx")
    tokenizer_file = folder / "tokenizer" / "1" / "tokenizer.json"
    tokenizer_file.write_text(tokenizer.to_str(), encoding="utf-8")
    limits = {"max_seq_length": info.max_seq_length, "max_text_bytes": args.max_text_bytes}
    cut = {"safe_cut": utils.safe_cut(tokenizer).pattern, "long_word": utils.LONG_WORD.pattern}
    thresholds = info.thresholds or [metric.DEFAULT_THRESHOLD] * len(info.labels)
    rule = {"labels": info.labels, "thresholds": thresholds, **info.limits}
    for name, settings in (("tokenizer", limits | cut), ("seqcls_postprocess", rule)):
        text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        (folder / name / "1" / "settings.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    utils.cli(main)
