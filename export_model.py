"""Checkpoint to static graph: the bundle that every deployment reads.

    python export_model.py --params_path ./checkpoint --output_path ./export

writes float32.pdmodel, .pdiparams and .pdiparams.info (Paddle 3: float32.json and .pdiparams) with
the tokenizer and config.json (labels, length, decision rule) beside them; with --onnx also
model.onnx. Inputs are input_ids and token_type_ids, the output is logits. The result is compared
with the trained model before the folder appears.
"""

import sys
from pathlib import Path

import utils
from utils import UserError, logger

model = utils.LazyModule("model")


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--params_path", default="./checkpoint/", help="checkpoint folder")
    add("--output_path", default="./export", help="folder of the bundle")
    add("--onnx", action="store_true", help="also write model.onnx, for hosts without Paddle")
    utils.add_limit_flags(add, "the checkpoint's")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    source, target = Path(args.params_path), Path(args.output_path)
    if (target / utils.WEIGHTS_FILE).exists():
        raise UserError(f"--output_path {target} holds a checkpoint; give another folder")
    info = utils.read_model_info(source)
    info = info.with_settings(min_labels=args.min_labels, max_labels=args.max_labels)
    utils.check_labels(source, None, info.labels)
    utils.load_tokenizer(source)  # checks it
    config = {**utils.read_json(source / utils.CONFIG_FILE), **info.limits}
    model.set_device("cpu")
    trained, _ = model.load_checkpoint(source)
    with utils.atomic_folder(target) as folder:
        check = model.write_bundle(folder, trained, config, source)
        if args.onnx:
            sys.path.insert(0, str(Path(__file__).resolve().parent / "deploy" / "predictor"))
            import predictor

            predictor.make_onnx(folder / model.PREFIX, "fp32")
            session = predictor.open_session(folder / model.PREFIX)
            check("ONNX model", predictor.onnx_forward(session))
        new_files = {file.name for file in folder.iterdir()}
    model.remove_old_graphs(target, new_files)
    logger.info("Exported to %s: %s", target, ", ".join(sorted(new_files)))


if __name__ == "__main__":
    utils.cli(main)
