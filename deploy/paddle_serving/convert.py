"""A bundle as Paddle Serving wants it: serving_server/ for the server, serving_client/ for clients.

    python convert.py --dirname ../../export

Does what `python -m paddle_serving_client.convert` did, which fails on Paddle 2.6, and copies what
else the service needs: labels, length, thresholds, tokenizer.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import utils
from utils import UserError, logger

PREFIX = "float32"
INT64, FLOAT32 = 0, 1  # Paddle Serving's numbers of the types


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dirname", default="../../export", help="bundle written by export_model.py")
    add("--serving_server", default="serving_server", help="folder for the server")
    add("--serving_client", default="serving_client", help="folder for clients of the C++ server")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    source, server = Path(args.dirname), Path(args.serving_server)
    info = utils.read_model_info(source)
    if info.model_sha256 is None:
        raise UserError(f"{source}: a checkpoint, not a bundle; run export_model.py on it")
    utils.static_graph_sha256(source / PREFIX)
    if utils.static_graph(source / PREFIX)[0].suffix == ".json":
        raise UserError(
            f"{source / PREFIX}.json: written by Paddle 3, which Paddle Serving cannot read; run "
            "export_model.py on the same checkpoint with Paddle 2.6.2 (requirements.txt)"
        )
    utils.load_tokenizer(source)  # checks it
    for flag, folder in (("--serving_server", server), ("--serving_client", args.serving_client)):
        if Path(folder).resolve() == source.resolve():
            raise UserError(f"{flag} {folder} is the bundle itself; give another folder")
    with utils.atomic_folder(args.serving_client) as folder:
        write_config(folder, "serving_client_conf", len(info.labels))
    with utils.atomic_folder(server) as folder:
        write_config(folder, "serving_server_conf", len(info.labels))
        utils.copy_tokenizer(source, folder)
        for name in (f"{PREFIX}.pdmodel", f"{PREFIX}.pdiparams", utils.CONFIG_FILE):
            shutil.copyfile(source / name, folder / name)
        onnx = utils.ONNX_FILES["fp32"]  # for engine: onnxruntime
        if (source / onnx).exists():
            shutil.copyfile(source / onnx, folder / onnx)
    logger.info("%d labels; model in %s, ready for service.py", len(info.labels), server)


def write_config(folder, name, num_labels):
    """Names, types and shapes of the static graph's inputs and output (-1: any length)."""
    from google.protobuf import text_format
    from paddle_serving_app.proto import general_model_config_pb2

    config = general_model_config_pb2.GeneralModelConfig()
    for feed in ("input_ids", "token_type_ids"):
        config.feed_var.add(name=feed, alias_name=feed, feed_type=INT64, shape=[-1])
    config.fetch_var.add(name="logits", alias_name="logits", fetch_type=FLOAT32, shape=[num_labels])
    text = text_format.MessageToString(config)
    (folder / f"{name}.prototxt").write_text(text, encoding="utf-8")
    (folder / f"{name}.stream.prototxt").write_bytes(config.SerializeToString())


if __name__ == "__main__":
    utils.cli(main)
