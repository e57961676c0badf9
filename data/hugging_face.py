"""Reads an encoder in Hugging Face's format: safetensors files under Hugging Face's names.

model.load_folder imports it when `train.py --model_name` is such a folder. NumPy only.
"""

import re

import numpy as np
import safetensors

import utils
from utils import CONFIG_FILE, WEIGHTS_FILE, UserError, logger

SAFETENSORS = "model.safetensors"
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16
# PaddleNLP's parameter names and Hugging Face's, as far as they differ.
NAMES = {
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
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
PREFIX = re.compile(r"^(module\.)?((bert|ernie)\.)?")
# Parts of Hugging Face's encoders that hold no weights, or none that this model uses.
UNUSED = re.compile(r"embeddings\.(position_ids|token_type_ids|task_type_embeddings\.weight)")


def read_weights(folder, new, encoder):
    """{parameter name: float32 array} under PaddleNLP's names from the files in `folder`.

    new: the untrained model's {parameter name: array}; encoder: the prefix of its encoder's names.
    Raises UserError if the encoder lacks a parameter or has one that the model does not know; a
    pooler may be missing, and whatever belongs to other heads is left out.
    """
    files = weight_files(folder)
    arrays = {}
    for path in files:
        for key, array in read_safetensors(path):
            arrays[rename(PREFIX.sub("", key), OLD_NAMES)] = array
    where = files[0] if len(files) == 1 else folder
    no_pooler = not any(key.startswith("pooler.") for key in arrays)
    if no_pooler:
        logger.warning("%s has no pooler; it starts from random weights", where)
    weights = {}
    for name, value in new.items():
        own = name.removeprefix(encoder)
        theirs = rename(own, NAMES)
        if theirs in arrays:
            array = arrays.pop(theirs)
            is_linear = array.ndim == 2 and "embeddings" not in theirs
            weights[name] = array.T if is_linear else array
        elif no_pooler and own.startswith("pooler."):
            weights[name] = value
        elif own != name:  # all but the classifier
            hint = f"which {CONFIG_FILE} beside it asks for"
            raise UserError(f"{where}: no parameter {theirs}, {hint}")
    for key in arrays:
        if key.startswith(("embeddings.", "encoder.")) and not UNUSED.fullmatch(key):
            hint = f"the model that {CONFIG_FILE} describes has none of this name"
            raise UserError(f"{where}: superfluous parameter {key}; {hint}")
    return weights


def weight_files(folder):
    """The safetensors files in a folder, one or several."""
    single, index = folder / SAFETENSORS, folder / f"{SAFETENSORS}.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = utils.read_json(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise UserError(f"{index}: weight_map does not name files of this folder")
        return [folder / name for name in names]
    if pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{pickles[0]}: a pickle, which can run any code when it is read; convert it to "
            f"{SAFETENSORS} where you trust it (see README.md) or download that file"
        )
    raise UserError(f"{folder}: neither {WEIGHTS_FILE} nor {SAFETENSORS}; not a model folder")


def read_safetensors(path):
    """Yields (name, float32 array) of a file; integers are no weights, such as position_ids."""
    try:
        with utils.open_binary(path) as file:
            tensors = safetensors.deserialize(file.read())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: broken weights file ({error})") from error
    for name, tensor in tensors:
        if tensor["dtype"] in FLOATS:
            array = np.frombuffer(tensor["data"], FLOATS[tensor["dtype"]])
            if tensor["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype("<u4") << 16).view("<f4")
            yield name, array.astype(np.float32).reshape(tensor["shape"])


def rename(key, names):
    for old, new in names.items():
        key = key.replace(old, new)
    return key
