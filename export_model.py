"""Checkpoint to static graph: the bundle that every deployment reads.

    python export_model.py --params_path ./checkpoint --output_path ./export

writes float32.pdmodel, .pdiparams and .pdiparams.info (inputs input_ids and token_type_ids, output
logits) with the tokenizer and config.json (labels, length, decision rule) beside them; with --onnx
also model.onnx. The result is compared with the trained model before the folder appears.

What reads a model folder is here, too: checkpoints, and what train.py starts from.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import itertools
import json
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import paddle
import paddle.inference
import safetensors
from paddlenlp import transformers
from paddlenlp.utils.log import logger as paddlenlp_logger

import utils
from utils import CONFIG_FILE, WEIGHTS_FILE, UserError, load_weights, logger, read_json

MODEL_CLASSES = {"ernie": "Ernie", "bert": "Bert"}  # model_type: prefix of PaddleNLP's classes
MODEL_NAMES = [
    *(f"ernie-3.0-{size}-zh" for size in ("xbase", "base", "medium", "micro", "mini", "nano")),
    "ernie-2.0-base-en",
    "ernie-2.0-large-en",
]
# What Hugging Face's config.json may say of a model that PaddleNLP computes in the same way.
ACTIVATIONS = {name: name for name in ("gelu", "relu", "silu")} | {"gelu_python": "gelu"}
# Settings that change the type or number of a model's results.
PLAIN = dict.fromkeys(
    ("return_dict", "use_cache", "output_hidden_states", "output_attentions"), False
)
# PaddleNLP's parameter names and Hugging Face's, as far as they differ.
HUGGING_FACE = {
    "embeddings.layer_norm": "embeddings.LayerNorm",
    "encoder.layers": "encoder.layer",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
# Parts of Hugging Face's encoders that hold no weights, or none that this model uses.
UNUSED = re.compile(r"embeddings\.(position_ids|token_type_ids|task_type_embeddings\.weight)")
SAFETENSORS = "model.safetensors"
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16
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
    utils.add_limit_flags(add, "the checkpoint's")
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
    description = read_json(path)
    model_type = description.get("model_type")
    check_support(path, "model_type", model_type, MODEL_CLASSES)
    activation = description.get("hidden_act", "gelu")
    check_support(path, "hidden_act", activation, ACTIVATIONS)
    positions = description.get("position_embedding_type", "absolute")
    check_support(path, "position_embedding_type", positions, ["absolute"])
    check_support(path, "pad_token_id", description.get("pad_token_id", 0), [0])  # see utils.pad
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        rate = description.get(name, 0.1)
        if not (isinstance(rate, int | float) and 0 <= rate < 1):
            raise UserError(f"{path}: {name} {rate!r} is no rate of at least 0 and below 1")
    prefix = MODEL_CLASSES[model_type]
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForSequenceClassification")
    try:
        # An absolute path keeps PaddleNLP from taking a folder for a name to download.
        config = config_class.from_pretrained(os.path.abspath(folder), num_labels=num_labels)
        vars(config).update(PLAIN, hidden_act=ACTIVATIONS[activation], dtype="float32")
        if not 0 <= config.layer_norm_eps <= 1e-3:  # Paddle's limits
            raise ValueError(f"layer_norm_eps {config.layer_norm_eps} is not between 0 and 1e-3")
        model = model_class(config)
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.LayerNorm):  # PaddleNLP's ERNIE always takes 1e-12
                layer._epsilon = config.layer_norm_eps
        if width_mult := description.get("width_mult"):  # written by prune.py
            cut_model(model, Fraction(width_mult))
        return model
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{path}: no valid model description ({error})") from error


def check_support(path, name, value, supported):
    if value not in [*supported]:
        known = ", ".join(map(str, supported))
        raise UserError(f"{path}: {name} {value!r} is not supported; use one of {known}")


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


# -------------------------------------------------------------------- what a training starts from
def load_pretrained(name, labels, work_dir):
    """Returns (model, folder with its tokenizer files) for a local folder or a PaddleNLP name.

    The classifier is new unless a local folder was trained with the very same labels.
    """
    if Path(name).is_dir():
        return load_folder(Path(name), labels), Path(name)
    if name not in MODEL_NAMES:
        raise UserError(
            f"--model_name {name}: neither a folder nor one of {', '.join(MODEL_NAMES)}"
        )
    try:
        auto = transformers.AutoModelForSequenceClassification
        model = auto.from_pretrained(name, num_labels=len(labels))
        transformers.AutoTokenizer.from_pretrained(name).save_pretrained(str(work_dir))
    except Exception as error:  # PaddleNLP raises OSError, RuntimeError, requests' errors ...
        raise UserError(
            f"--model_name {name}: cannot be downloaded ({type(error).__name__}); without network "
            f"give a local folder with {CONFIG_FILE}, vocab.txt and {WEIGHTS_FILE} or {SAFETENSORS}"
        ) from error
    return model, work_dir


def load_folder(folder, labels):
    """A classifier with the weights of a local folder, in PaddleNLP's or Hugging Face's format."""
    model = build_model(folder, len(labels))
    path, encoder = folder / WEIGHTS_FILE, model.base_model_prefix + "."
    if path.exists():
        weights = load_weights(path)
        if not any(key.startswith(encoder) for key in weights):  # saved from the bare encoder
            weights = {encoder + key: value for key, value in weights.items()}
    else:
        path = folder / SAFETENSORS
        weights = from_hugging_face(read_safetensors(folder), model, path)
    names = read_json(folder / CONFIG_FILE).get("id2label") or {}
    same_labels = [names[i] for i in sorted(names, key=int)] == labels
    new = model.state_dict()
    used = {k: v.numpy() for k, v in new.items() if not k.startswith(encoder)}
    kept = [k for k in weights if k in new and (k.startswith(encoder) or same_labels)]
    used.update({k: weights[k] for k in kept})
    set_weights(model, used, path)
    return model


def read_safetensors(folder):
    """{parameter name: float32 array} of the safetensors files in a folder, one or several."""
    files, index = [folder / SAFETENSORS], folder / f"{SAFETENSORS}.index.json"
    if not files[0].exists():
        if index.exists():
            shards = read_json(index).get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
            if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
                raise UserError(f"{index}: weight_map does not name files of this folder")
            files = [folder / name for name in names]
        elif pickles := sorted(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{pickles[0]}: a pickle, which can run any code when it is read; convert it to "
                f"{SAFETENSORS} where you trust it (see README.md) or download that file"
            )
        else:
            raise UserError(f"{folder}: neither {WEIGHTS_FILE} nor {SAFETENSORS}; no model folder")
    arrays = {}
    for path in files:
        try:
            with utils.open_binary(path) as file:
                tensors = safetensors.deserialize(file.read())
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: broken weights file ({error})") from error
        for name, tensor in tensors:
            if tensor["dtype"] in FLOATS:  # others are no weights, such as position_ids
                array = np.frombuffer(tensor["data"], FLOATS[tensor["dtype"]])
                if tensor["dtype"] == "BF16":  # the upper half of a float32
                    array = (array.astype("<u4") << 16).view("<f4")
                arrays[name] = array.astype(np.float32).reshape(tensor["shape"])
    return arrays


def from_hugging_face(arrays, model, path):
    """{parameter name: array} for the model from arrays under Hugging Face's names.

    Raises UserError if the encoder lacks a parameter or has one that the model does not know; a
    pooler may be missing, and whatever belongs to other heads is left out.
    """
    prefix = re.compile(r"^(module\.)?((bert|ernie)\.)?")
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    arrays = {rename(prefix.sub("", key), old): array for key, array in arrays.items()}
    no_pooler = not any(key.startswith("pooler.") for key in arrays)
    if no_pooler:
        logger.warning("%s has no pooler; it starts from random weights", path)
    weights = {}
    for name, value in model.state_dict().items():
        own = name.removeprefix(model.base_model_prefix + ".")
        theirs = rename(own, HUGGING_FACE)
        if theirs in arrays:
            array = arrays.pop(theirs)
            is_linear = array.ndim == 2 and "embeddings" not in theirs
            weights[name] = array.T if is_linear else array
        elif no_pooler and own.startswith("pooler."):
            weights[name] = value.numpy()
        elif own != name:  # all but the classifier
            raise UserError(
                f"{path}: no parameter {theirs}, which {CONFIG_FILE} beside it asks for"
            )
    for key in arrays:
        if key.startswith(("embeddings.", "encoder.")) and not UNUSED.fullmatch(key):
            raise UserError(f"{path}: {key} is no part of the model that {CONFIG_FILE} describes")
    return weights


def rename(key, names):
    for old, new in names.items():
        key = key.replace(old, new)
    return key


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
    info = info.with_limits(args.min_labels, args.max_labels)
    tokenizer = utils.load_tokenizer(source)
    encoded, _ = utils.encode(check_texts(args.check_file), tokenizer, info.max_seq_length)
    config = {**read_json(source / CONFIG_FILE), **info.limits}
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
