"""Hugging Face's format, in and out: safetensors files under Hugging Face's names.

model.load_folder reads such an encoder with it (`train.py --model_name FOLDER`), export_model.py
writes such a classifier (`--hugging_face FOLDER`). NumPy and tokenizers only.
"""

import json
import re
import shutil

import numpy as np
import safetensors.numpy
from tokenizers import decoders, processors

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
# What of a model's config Hugging Face's needs; the last two belong to ERNIE.
SHAPE = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout max_position_embeddings
    type_vocab_size initializer_range layer_norm_eps pad_token_id
    use_task_id task_type_vocab_size"""
TASK_TYPES = "embeddings.task_type_embeddings.weight"
# The first lines of README.md are for the Hub, the last ones for whoever loads the model.
CARD = """---
{language}license: unknown
library_name: transformers
pipeline_tag: text-classification
tags:
- multi-label-classification
---

{card}```python
from transformers import pipeline

settings = {{"top_k": None, "function_to_apply": "sigmoid"}}
classify = pipeline("text-classification", model={folder}, **settings)
config = classify.model.config
thresholds = config.thresholds or [0.5] * config.num_labels
thresholds = {{config.id2label[i]: threshold for i, threshold in enumerate(thresholds)}}
for scores in classify(["待分类的文本"], truncation=True):  # 截断到 {max_seq_length} 个词元
    print([x["label"] for x in scores if x["score"] > thresholds[x["label"]]])
```

min_labels、max_labels（每条文本至少、至多几个标签）和阈值在 config.json 里，transformers 不用它们。
"""
SPECIAL_TOKENS = {f"{name[1:-1].lower()}_token": name for name in utils.SPECIAL_TOKENS}


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
            weights[name] = turned(theirs, arrays.pop(theirs))
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


def turned(key, array):
    """The array of a parameter in the other format: a linear layer's [in, out] is [out, in]."""
    return array.T if array.ndim == 2 and "embeddings" not in key else array


# ------------------------------------------------------------------------------------------- out
def check_model(path, config):
    """Raises UserError if Hugging Face's classes cannot compute what config.json at `path` says."""
    if config.get("width_mult"):
        why = "a pruned model, and Hugging Face's have no narrower layers"
        raise UserError(f"{path}: {why}; give --params_path the checkpoint that was pruned")
    activation = config.get("pool_act", "tanh")  # of PaddleNLP's BERT; its ERNIE takes tanh
    if config.get("model_type") == "bert" and activation != "tanh":
        raise UserError(f"{path}: pool_act {activation!r}; Hugging Face's BERT knows tanh only")


def write_folder(folder, model, info, tokenizer_dir):
    """Writes what transformers' AutoModelForSequenceClassification and AutoTokenizer load.

    model: a classifier that check_model lets pass; info: its utils.ModelInfo.
    """
    encoder = model.base_model_prefix + "."
    arrays = {}
    for name, value in model.state_dict().items():
        prefix = encoder if name.startswith(encoder) else ""
        theirs = rename(name.removeprefix(encoder), NAMES)
        array = turned(theirs, value.numpy())
        if theirs == TASK_TYPES:  # Hugging Face's ERNIE always takes row 0
            array = np.roll(array, -model.config.task_id, axis=0)
        arrays[prefix + theirs] = np.ascontiguousarray(array)
    data = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    (folder / SAFETENSORS).write_bytes(data)
    shape = {name: getattr(model.config, name, None) for name in SHAPE.split()}
    config = {
        "architectures": [type(model).__name__],
        "model_type": encoder[:-1],
        "problem_type": "multi_label_classification",
        **{name: value for name, value in shape.items() if value is not None},
        "id2label": dict(enumerate(info.labels)),
        "label2id": {name: i for i, name in enumerate(info.labels)},
        "max_seq_length": info.max_seq_length,
        **info.rule,
    }
    write_json(folder / CONFIG_FILE, config)
    write_tokenizer(folder, tokenizer_dir, info.max_seq_length)


def write_tokenizer(folder, tokenizer_dir, max_seq_length):
    """The tokenizer of `tokenizer_dir` for transformers, which gives the same token ids."""
    tokenizer = utils.load_tokenizer(tokenizer_dir)
    cls_sep = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=cls_sep
    )
    tokenizer.decoder = decoders.WordPiece()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    shutil.copyfile(tokenizer_dir / "vocab.txt", folder / "vocab.txt")
    path = tokenizer_dir / "tokenizer_config.json"
    own = utils.read_json(path) if path.exists() else {}
    names = "do_lower_case", "strip_accents", "tokenize_chinese_chars"
    config = {
        # Takes tokenizer.json as it is; BertTokenizer takes the vocabulary alone out of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_length,
        **{name: own[name] for name in names if name in own},  # for the way back in
        **SPECIAL_TOKENS,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_card(folder, card, language, info, name):
    """README.md. card, language: see model_card.describe; name: of the folder in the end."""
    settings = {"folder": json.dumps(name, ensure_ascii=False)}
    settings["max_seq_length"] = info.max_seq_length
    settings["language"] = f"language: {language}\n" if language else ""
    (folder / "README.md").write_text(CARD.format(card=card, **settings), encoding="utf-8")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
