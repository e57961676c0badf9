"""Checkpoint to static graph.

load_checkpoint rebuilds the trained model from a checkpoint folder, save_static writes it as
`<prefix>.pdmodel`, `.pdiparams`, `.pdiparams.info` with inputs input_ids and token_type_ids.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import os
from pathlib import Path

import paddle
import paddle.inference
from paddlenlp import transformers
from paddlenlp.utils.log import logger as paddlenlp_logger

import utils
from utils import CONFIG_FILE, WEIGHTS_FILE, UserError, load_weights, read_json, read_model_info

MODEL_CLASSES = {"ernie": "Ernie", "bert": "Bert"}  # model_type: prefix of PaddleNLP's classes
paddlenlp_logger.set_level("WARNING")  # its notes on every file drown the log lines that matter


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
        return model_class(config)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no valid model description ({error})") from error


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
    info = read_model_info(params_path)
    model = build_model(params_path, len(info.labels))
    weights_file = Path(params_path) / WEIGHTS_FILE
    set_weights(model, load_weights(weights_file), weights_file)
    model.eval()
    return model, info


def save_static(model, prefix):
    """Traces the model in eval mode: two int64 inputs [batch, length], output the logits."""
    model.eval()
    inputs = [
        paddle.static.InputSpec([None, None], "int64", name)
        for name in ("input_ids", "token_type_ids")
    ]
    static_model = paddle.jit.to_static(model, input_spec=inputs, full_graph=True)
    paddle.jit.save(static_model, str(prefix))
