"""Checkpoint to static graph: the bundle that every deployment reads.

    python export_model.py --params_path ./checkpoint --output_path ./export

writes float32.pdmodel, .pdiparams and .pdiparams.info (Paddle 3: float32.json and .pdiparams) with
the tokenizer, config.json (labels, length, decision rule) and MODEL_CARD.md beside them; with
--onnx also model.onnx; with --hugging_face also a folder for Hugging Face's transformers. Inputs
are input_ids and token_type_ids, the output is logits. The result is compared with the trained
model before the folders appear.
"""

import contextlib
import os
import sys
from pathlib import Path

import utils
from utils import UserError, logger

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "analysis"))
model, model_card = utils.LazyModule("model"), utils.LazyModule("model_card")


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--params_path", default="./checkpoint/", help="checkpoint folder")
    add("--output_path", default="./export", help="folder of the bundle")
    add("--onnx", action="store_true", help="also write model.onnx, for hosts without Paddle")
    add("--hugging_face", help="new folder for the model in Hugging Face's format; None: none")
    add("--dataset_dir", help="folder with the dev set that the model card reports; None: none")
    add("--dev_file", default="dev.txt", help="development set in --dataset_dir")
    utils.add_limit_flags(add, "the checkpoint's")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    source, target = Path(args.params_path), Path(args.output_path)
    if any((target / name).exists() for name in (utils.WEIGHTS_FILE, "model.safetensors")):
        raise UserError(f"--output_path {target} holds a checkpoint; give another folder")
    info = utils.read_model_info(source)
    info = info.with_settings(min_labels=args.min_labels, max_labels=args.max_labels)
    utils.check_labels(source, None, info.labels)
    utils.load_tokenizer(source)  # checks it
    config = {**utils.read_json(source / utils.CONFIG_FILE), **info.limits}
    dev_set = None
    if args.dataset_dir:
        utils.check_labels(args.dataset_dir, None, info.labels)
        path = Path(args.dataset_dir) / args.dev_file
        dev_set = path.name, *utils.read_examples(path, info.labels)
    if other := args.hugging_face and Path(args.hugging_face):
        check_new_folder(other, target)
        model.hugging_face.check_model(source / utils.CONFIG_FILE, config)
    model.set_device("cpu")
    trained, _ = model.load_checkpoint(source)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(utils.atomic_folder(target))
        check = model.write_bundle(folder, trained, config, source)
        if args.onnx:
            sys.path.insert(0, str(ROOT / "deploy" / "predictor"))
            import predictor

            predictor.make_onnx(folder / model.PREFIX, "fp32")
            session = predictor.open_session(folder / model.PREFIX)
            check("ONNX model", predictor.onnx_forward(session))
        report = None
        if dev_set:
            forward = model.static_forward(folder / model.PREFIX)
            report = model_card.dev_report(forward, utils.load_tokenizer(source), info, *dev_set)
        card, language = model_card.describe(source, trained, info, report)
        loading = model_card.LOADING.format(name_of(target))
        (folder / model_card.NAME).write_text(card + loading, encoding="utf-8")
        if other:
            place = stack.enter_context(utils.atomic_folder(other))
            model.hugging_face.write_folder(place, trained, info, source)
            model.hugging_face.write_card(place, card, language, info, name_of(other))
            read_back = model.load_folder(place, info.labels)
            read_back.eval()
            check("Hugging Face model", model.dygraph_forward(read_back))
        new_files = {file.name for file in folder.iterdir()}
    model.remove_old_graphs(target, new_files)
    logger.info("Exported to %s: %s", target, ", ".join(sorted(new_files)))
    if other:
        logger.info("Hugging Face model in %s", other)


def name_of(folder):
    return utils.printable(os.path.basename(os.path.realpath(folder)))


def check_new_folder(folder, target):
    """Raises UserError unless --hugging_face names a folder that is new and not --output_path."""
    if os.path.realpath(folder) == os.path.realpath(target):
        raise UserError(f"--hugging_face {folder} is the --output_path; give another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--hugging_face {folder}: the folder is not empty; give a new one")


if __name__ == "__main__":
    utils.cli(main)
