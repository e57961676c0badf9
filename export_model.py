"""Checkpoint to static graph.

load_checkpoint rebuilds the trained model from a checkpoint folder, save_static writes it as
`<prefix>.pdmodel`, `.pdiparams`, `.pdiparams.info` with inputs input_ids and token_type_ids.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import os
from pathlib import Path

import paddle
from paddlenlp import transformers
from paddlenlp.utils.log import logger as paddlenlp_logger

from utils import CONFIG_FILE, WEIGHTS_FILE, UserError, load_weights, read_json, read_model_info

MODEL_CLASSES = {"ernie": "Ernie", "bert": "Bert"}  # model_type: prefix of PaddleNLP's classes
paddlenlp_logger.set_level("WARNING")  # its notes on every file drown the log lines that matter


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
