"""Checkpoint to static graph: the bundle that every deployment reads.

    python export_model.py --params_path ./checkpoint --output_path ./export

writes float32.pdmodel, .pdiparams and .pdiparams.info (inputs input_ids and token_type_ids, output
logits) with the tokenizer and config.json (labels, length, thresholds) beside them; with --onnx
also model.onnx. The result is compared with the trained model before the folder appears.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import itertools
import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import paddle
import paddle.inference
from paddlenlp import transformers
from paddlenlp.utils.log import logger as paddlenlp_logger

import utils
from utils import CONFIG_FILE, WEIGHTS_FILE, UserError, load_weights, logger, read_json

MODEL_CLASSES = {"ernie": "Ernie", "bert": "Bert"}  # model_type: prefix of PaddleNLP's classes
PREFIX = "float32"  # name of the static graph's files in a bundle
MAX_DIFFERENCE = 1e-4  # of a logit, between the trained model and what is exported
CHECK_TEXTS, CHECK_BATCH = 64, 16
REPO = Path(__file__).resolve().parent
paddlenlp_logger.set_level("WARNING")  # its notes on every file drown the log lines that matter


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--params_path", default="./checkpoint/", help="checkpoint folder")
    add("--output_path", default="./export", help="folder of the bundle")
    add("--onnx", action="store_true", help="also write model.onnx, for hosts without Paddle")
    check = "texts, one per line, on which the export is compared with the trained model"
    add("--check_file", default=str(REPO / "data" / "data.txt"), help=check)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------- forward
def local_size():
    """Ranks of this launch on this machine; 1 without a launcher."""
    if "PADDLE_LOCAL_SIZE" in os.environ:
        return int(os.environ["PADDLE_LOCAL_SIZE"])
    # The launcher for one machine does not set it.
    return max(1, len(os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")))


def num_threads():
    """Threads of a process: OMP_NUM_THREADS, else its cores, shared among the ranks of a launch.

    The value 1 does not count: Paddle sets it at import where the variable is missing.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 1:
        return int(wanted)
    return max(1, utils.num_cores() // local_size())


def set_device(device):
    """Selects the device; on the CPU also lets the matrix library work at full speed.

    MKL takes its slow SSE kernels on AMD processors unless told otherwise (read at the first matrix
    product), and Paddle limits dygraph to one thread; what both settings gain is measured by
    benchmarks/cpu_math.py. Raises UserError if this Paddle can't use the device.
    """
    if device == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        features = cpuinfo.read_text() if cpuinfo.exists() else ""
        if "AuthenticAMD" in features and "avx2" in features:
            os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")  # its AVX2 kernels
        paddle.base.core.set_num_threads(num_threads())
    try:
        paddle.set_device(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--device {device}: this PaddlePaddle cannot use it; use --device cpu or install the "
            f"matching build (requirements-gpu.txt for gpu)"
        ) from error


def dygraph_forward(model):
    """Forward of a dygraph model; see utils.run_batches."""

    def forward(input_ids, token_type_ids):
        with paddle.no_grad():
            logits = model(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
        return logits.astype("float32").numpy()

    return forward


def static_forward(prefix):
    """Forward of the static graph `<prefix>.pdmodel` on the CPU; see utils.run_batches.

    Paddle's predictor puts the process back to one thread; call set_device before dygraph work.
    """
    config = paddle.inference.Config(f"{prefix}.pdmodel", f"{prefix}.pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    config.set_mkldnn_cache_capacity(16)  # bounds the memory: one entry per batch shape
    config.set_cpu_math_library_num_threads(num_threads())
    predictor = paddle.inference.create_predictor(config)
    inputs = [predictor.get_input_handle(name) for name in ("input_ids", "token_type_ids")]
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def forward(input_ids, token_type_ids):
        for handle, array in zip(inputs, (input_ids, token_type_ids)):
            handle.reshape(array.shape)
            handle.copy_from_cpu(array)
        predictor.run()
        return output.copy_to_cpu()

    return forward


# --------------------------------------------------------------------------------------- model
def build_model(folder, num_labels):
    """An untrained classifier of the architecture that `folder`/config.json describes."""
    path = Path(folder) / CONFIG_FILE
    model_type = read_json(path).get("model_type")
    if model_type not in MODEL_CLASSES:
        known = ", ".join(MODEL_CLASSES)
        raise UserError(f"{path}: model_type '{model_type}' is not supported; use one of {known}")
    prefix = MODEL_CLASSES[model_type]
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForSequenceClassification")
    try:
        # An absolute path keeps PaddleNLP from taking a folder for a name to download.
        config = config_class.from_pretrained(os.path.abspath(folder), num_labels=num_labels)
        model = model_class(config)
        if width_mult := read_json(path).get("width_mult"):  # written by prune.py
            cut_model(model, Fraction(width_mult))
        return model
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no valid model description ({error})") from error


def cut_model(model, width_mult):
    """Makes a model of full width narrower in place; the new layers hold no trained weights.

    Attention keeps `width_mult` of its heads, the feed-forward layer of its neurons (rounded down).
    """
    for layer in model.base_model.encoder.layers:
        attention = layer.self_attn
        attention.num_heads = int(attention.num_heads * width_mult)
        hidden, heads = attention.embed_dim, attention.num_heads * attention.head_dim
        inner = int(layer.linear1.weight.shape[1] * width_mult)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, paddle.nn.Linear(hidden, heads))
        attention.out_proj = paddle.nn.Linear(heads, hidden)
        layer.linear1 = paddle.nn.Linear(hidden, inner)
        layer.linear2 = paddle.nn.Linear(inner, hidden)


def set_weights(model, weights, where):
    """Sets all parameters; raises UserError that names a missing, superfluous or misshapen one."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: parameter {name} has shape {found.get(name)}, the model needs "
                f"{expected.get(name)}; is it a checkpoint of another model or label set?"
            )
    model.set_state_dict({name: value.astype("float32") for name, value in weights.items()})


def load_checkpoint(params_path):
    """Returns (model in eval mode, utils.ModelInfo). Raises UserError for a broken folder."""
    info = utils.read_model_info(params_path)
    model = build_model(params_path, len(info.labels))
    weights_file = Path(params_path) / WEIGHTS_FILE
    set_weights(model, load_weights(weights_file), weights_file)
    model.eval()
    return model, info


# -------------------------------------------------------------------------------------- export
def save_static(model, prefix):
    """Traces the model in eval mode: int64 input_ids, token_type_ids [batch, length] to logits."""
    model.eval()
    inputs = [
        paddle.static.InputSpec([None, None], "int64", name)
        for name in ("input_ids", "token_type_ids")
    ]
    static_model = paddle.jit.to_static(model, input_spec=inputs, full_graph=True)
    paddle.jit.save(static_model, str(prefix))
    name_output(Path(f"{prefix}.pdmodel"))


def name_output(path):
    """Paddle names the output after its last operation; every server would have to know it."""
    program = paddle.base.core.ProgramDesc(path.read_bytes())
    block = program.block(0)
    operations = [block.op(i) for i in range(block.op_size())]
    (output,) = (name for op in operations if op.type() == "fetch" for name in op.input("X"))
    block._rename_var(output.encode(), b"logits")
    path.write_bytes(program.serialize_to_string())


def write_bundle(folder, model, config, tokenizer_dir, encoded):
    """Writes the static graph and what inference needs beside it: tokenizer, labels, length.

    config: what config.json shall hold. The graph's logits for `encoded` texts must be the model's;
    these are returned. Raises UserError if they differ.
    """
    num_labels = len(config["id2label"])
    # Before static_forward, which takes the threads away.
    expected = utils.logits_of(dygraph_forward(model), encoded, CHECK_BATCH, num_labels)
    save_static(model, folder / PREFIX)
    utils.copy_tokenizer(tokenizer_dir, folder)
    files = (folder / f"{PREFIX}{suffix}" for suffix in (".pdmodel", ".pdiparams"))
    # Binds config.json and the ONNX files to these weights.
    text = json.dumps(
        {**config, "model_sha256": utils.sha256(*files)}, ensure_ascii=False, indent=2
    )
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    check_difference("static graph", static_forward(folder / PREFIX), encoded, expected)
    return expected


def remove_old_onnx(target, made):
    """Removes the ONNX files of the weights that were in the folder before."""
    for name in utils.ONNX_FILES.values():
        if name not in made:
            (target / name).unlink(missing_ok=True)


def check_texts(path):
    """Some texts of the file, one that fills the longest sequence, and an empty one."""
    texts = list(itertools.islice(utils.read_texts(path), CHECK_TEXTS))
    joined = "".join(texts)
    return [*texts, joined * (1 + 2048 // max(1, len(joined))), ""]


def check_difference(name, forward, encoded, expected):
    """Raises UserError if the forward's logits are not the expected ones [texts, classes]."""
    logits = utils.logits_of(forward, encoded, CHECK_BATCH, expected.shape[1])
    difference = float(np.abs(logits - expected).max())
    texts = f"on {len(expected)} texts"
    if not difference <= MAX_DIFFERENCE:  # also when it is nan
        limit = f"more than {MAX_DIFFERENCE:g}; nothing was written"
        raise UserError(f"the logits of the {name} differ by {difference:.2e} {texts}, {limit}")
    logger.info("Largest difference of a logit, %s and model: %.2e %s", name, difference, texts)


def main(argv=None):
    args = parse_args(argv)
    source, target = Path(args.params_path), Path(args.output_path)
    if (target / WEIGHTS_FILE).exists():
        raise UserError(f"--output_path {target} holds a checkpoint; give another folder")
    set_device("cpu")
    model, info = load_checkpoint(source)
    tokenizer = utils.load_tokenizer(source)
    encoded, _ = utils.encode(check_texts(args.check_file), tokenizer, info.max_seq_length)
    config = read_json(source / CONFIG_FILE)
    with utils.atomic_folder(target) as folder:
        expected = write_bundle(folder, model, config, source, encoded)
        if args.onnx:
            sys.path.insert(0, str(REPO / "deploy" / "predictor"))
            import predictor

            predictor.make_onnx(folder / PREFIX, "fp32")
            forward = predictor.onnx_forward(predictor.open_session(folder / PREFIX))
            check_difference("ONNX model", forward, encoded, expected)
        made = {file.name for file in folder.iterdir()}
    remove_old_onnx(target, made)
    logger.info("Exported to %s: %s", target, ", ".join(sorted(made)))


if __name__ == "__main__":
    utils.cli(main)
