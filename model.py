"""The Paddle side of a model: device, build, load, run, train on, save.

The only shared file that imports Paddle. Scripts import it after they have read their arguments,
because that takes seconds.
"""

import contextlib
import copy
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import pickle
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.inference
import paddle.nn.functional as F
from paddle.autograd import PyLayer

import metric
import utils
from utils import CONFIG_FILE, WEIGHTS_FILE, UserError, logger, read_json

sys.path.append(str(Path(__file__).resolve().parent / "data"))
hugging_face = utils.LazyModule("hugging_face")  # only such folders need it

MODEL_CLASSES = {"ernie": "Ernie", "bert": "Bert"}  # model_type: prefix of PaddleNLP's classes
# What Hugging Face's config.json may say of a model that PaddleNLP computes in the same way.
ACTIVATIONS = {name: name for name in ("gelu", "relu", "silu")} | {"gelu_python": "gelu"}
# Settings that change the type or number of a model's results.
PLAIN = dict.fromkeys(
    ("return_dict", "use_cache", "output_hidden_states", "output_attentions"), False
)
PIR = int(paddle.__version__.split(".")[0]) >= 3  # the static graph is a .json, not a .pdmodel
PREFIX = "float32"  # name of the static graph's files in a bundle
MAX_DIFFERENCE = 1e-4  # of a logit, between the trained model and what is exported
CHECK_SEQUENCES, CHECK_BATCH = 64, 16
SHOWN_LABELS = 5  # names in one log line
LOSS_SCALE = 2.0**20  # see scaled_backward
MIN_SHARE = 8  # texts of a batch; see Replicas


def _import_transformers():
    """paddlenlp.transformers alone. PaddleNLP's own __init__.py also imports its data sets, task
    flows and trainers, hence pandas, pyarrow and scikit-learn, which takes three seconds."""
    if "paddlenlp" not in sys.modules:
        version = importlib.metadata.version("paddlenlp")
        package = importlib.util.module_from_spec(importlib.util.find_spec("paddlenlp"))
        package.__version__ = version
        sys.modules["paddlenlp"] = package
        paddle.disable_signal_handler()  # as that file does
    importlib.import_module("paddlenlp.data")  # it and transformers import each other; it is first
    from paddlenlp import transformers
    from paddlenlp.utils.log import logger

    logger.set_level("WARNING")  # its notes on every file drown the log lines that matter
    return transformers


transformers = _import_transformers()


# ------------------------------------------------------------------------- device and processes
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
        paddle.set_flags({"FLAGS_use_stride_kernel": False})  # its views are copied time and again
    try:
        paddle.set_device(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--device {device}: this PaddlePaddle cannot use it; use --device cpu or install the "
            f"matching build (requirements-gpu.txt for gpu)"
        ) from error


def init_processes():
    """Connects the processes of a launch, if there are several; returns (rank, their number)."""
    if dist.get_world_size() > 1:
        if os.name == "nt":
            raise UserError("several processes need Linux (or WSL); start the script by itself")
        dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size()


def all_reduce(array):
    """Element-wise sum of a NumPy array over all ranks."""
    if dist.get_world_size() == 1:
        return array
    tensor = paddle.to_tensor(array)
    dist.all_reduce(tensor)
    return tensor.numpy()


def on_rank_0(function, *args):
    """Rank 0's result for all ranks; its UserError is raised by all, so that none waits for it."""
    result, error = _outcome(function, args) if dist.get_rank() == 0 else (None, None)
    if dist.get_world_size() > 1:
        shared = [(result, error)]
        dist.broadcast_object_list(shared, src=0)
        result, error = shared[0]
    if error:
        raise UserError(error)
    return result


def _outcome(function, args):
    """(result, message of a UserError); one of the two is None."""
    try:
        return function(*args), None
    except UserError as error:
        return None, str(error)


def local_rank():
    """The number of this rank on its machine, from 0."""
    return int(os.environ.get("PADDLE_RANK_IN_NODE", 0))


def on_each_machine(function, *args):
    """The result of the first rank of each machine for the others there, however long it takes. A
    UserError of one machine is raised by all ranks of all machines."""
    own = _outcome(function, args) if local_rank() == 0 else (None, None)
    outcomes = [own]
    if dist.get_world_size() > 1:
        meet()
        outcomes = []
        dist.all_gather_object(outcomes, own)
    for _, error in outcomes:
        if error:
            raise UserError(error)
    return outcomes[dist.get_rank() - local_rank()][0]


_meetings = 0  # of this process


def meet():
    """Returns when all ranks have come to this call.

    Unlike a barrier, it may take longer than the 30 seconds after which gloo gives up.
    """
    global _meetings
    _meetings += 1
    if dist.get_world_size() > 1:
        store = dist.collective._default_store
        store.add("meetings", 1)
        while store.add("meetings", 0) < _meetings * dist.get_world_size():
            time.sleep(0.1)


def read_sets(paths, *settings):
    """utils.EncodedSet of each data file, encoded once on each machine. settings: see
    utils.encode_file. Raises UserError on all ranks."""

    def encode_files():
        return [str(utils.encode_file(path, *settings)) for path in paths]

    return [utils.open_set(folder) for folder in on_each_machine(encode_files)]


# -------------------------------------------------------------------------------------- forward
def dygraph_forward(model):
    """Forward of a dygraph model, which it puts into eval mode; see utils.run_batches."""
    model.eval()

    def forward(input_ids, token_type_ids):
        with paddle.no_grad():
            logits = model(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
        return logits.astype("float32").numpy()

    return forward


def static_forward(prefix):
    """Forward of the static graph `prefix` on the CPU; see utils.run_batches.

    Paddle's predictor puts the process back to one thread; call set_device before dygraph work.
    Raises UserError if this Paddle is too old for the graph.
    """
    if utils.static_graph(prefix)[0].suffix == ".json" and not PIR:
        raise UserError(
            f"{prefix}.json: written by Paddle 3, which Paddle {paddle.__version__} cannot read; "
            "export the checkpoint again with it"
        )
    with utils.native_path(prefix) as native:
        config = paddle.inference.Config(*map(str, utils.static_graph(native)))
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


def fast_forward(model, device):
    """The faster forward of a model: the static graph on the CPU, else dygraph."""
    if device != "cpu":
        return dygraph_forward(model)
    with tempfile.TemporaryDirectory() as folder:
        save_static(model, Path(folder) / "model")
        return static_forward(Path(folder) / "model")


def load_labeller(params_path, device, info=None, **settings):
    """utils.Labeller of a checkpoint. info: its ModelInfo with other settings; None: its own."""
    set_device(device)
    model, own = load_checkpoint(params_path)
    tokenizer = utils.load_tokenizer(params_path)
    return utils.Labeller(fast_forward(model, device), tokenizer, info or own, **settings)


# ---------------------------------------------------------------------------------- build, load
def build_model(folder, num_labels):
    """An untrained classifier of the architecture that `folder`/config.json describes."""
    path = Path(folder) / CONFIG_FILE
    description = read_json(path)
    for name, default, supported in (
        ("model_type", None, list(MODEL_CLASSES)),
        ("hidden_act", "gelu", list(ACTIVATIONS)),
        ("position_embedding_type", "absolute", ["absolute"]),
        ("pad_token_id", 0, [0]),  # see utils.pad
    ):
        if (value := description.get(name, default)) not in supported:
            known = ", ".join(map(str, supported))
            raise UserError(f"{path}: {name} {value!r} is not supported; use one of {known}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        rate = description.get(name, 0.1)
        if not (isinstance(rate, int | float) and 0 <= rate < 1):
            raise UserError(f"{path}: {name} {rate!r} is not a rate of at least 0 and below 1")
    prefix = MODEL_CLASSES[description["model_type"]]
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForSequenceClassification")
    try:
        # An absolute path keeps PaddleNLP from taking a folder for a name to download.
        config = config_class.from_pretrained(os.path.abspath(folder), num_labels=num_labels)
        vars(config).update(PLAIN, hidden_act=ACTIVATIONS[config.hidden_act], dtype="float32")
        if not 0 <= config.layer_norm_eps <= 1e-3:  # Paddle's limits
            raise ValueError(f"layer_norm_eps {config.layer_norm_eps} is not between 0 and 1e-3")
        model = model_class(config)
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.LayerNorm):  # PaddleNLP's ERNIE always takes 1e-12
                layer._epsilon = config.layer_norm_eps
        if width_mult := description.get("width_mult"):  # written by prune.py
            narrow_layers(model, Fraction(width_mult))
        return model
    except Exception as error:  # PaddleNLP and Paddle raise almost anything
        raise UserError(f"{path}: no valid model description ({error})") from error


def narrow_layers(model, width_mult):
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
    check_shapes(expected, weights, where)
    model.set_state_dict({name: value.astype("float32") for name, value in weights.items()})


def check_shapes(expected, weights, where):
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{where}: parameter {name} has shape {found.get(name)}, the model needs "
                f"{expected.get(name)}; is it a checkpoint of another model or label set?"
            )


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and containers only; a pickle that names anything else is refused."""

    allowed = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict"),
        ("builtins", "tuple"),
        ("_codecs", "encode"),
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no weights file needs")
        return super().find_class(module, name)


def load_weights(path):
    """{parameter name: array} of a `.pdparams` file, read without running code that it may carry.

    Raises UserError if the file is truncated or names any class but NumPy's.
    """
    with utils.open_binary(path) as file:
        try:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
            # paddle.save stores a tensor as (name, array), and a table of names beside them.
            weights = {k: v[1] if isinstance(v, tuple) else v for k, v in loaded.items()}
        except Exception as error:  # a broken pickle raises almost anything
            raise UserError(f"{path}: broken weights file ({error})") from error
    return {k: v for k, v in weights.items() if isinstance(v, np.ndarray)}


def weights_of(model):
    """{parameter name: array} of a model."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def save_weights(file, weights):
    """Writes {parameter name: array} in the format of paddle.save to an open binary file."""
    pickle.dump(dict(weights), file, protocol=4)


def load_checkpoint(params_path, labels=None):
    """Returns (model in eval mode, utils.ModelInfo). Raises UserError for a broken folder.

    labels: the same names in the order that the logits shall have; None: the checkpoint's.
    """
    info = utils.read_model_info(params_path)
    model = build_model(params_path, len(info.labels))
    weights_file = Path(params_path) / WEIGHTS_FILE
    weights = load_weights(weights_file)
    if labels not in (None, info.labels):
        weights = fit_classifier(weights, model, info.labels, labels, weights_file)
        rule = dict(zip(info.labels, info.thresholds or []))
        info = replace(
            info, labels=labels, thresholds=[rule[name] for name in labels] if rule else None
        )
    set_weights(model, weights, weights_file)
    model.eval()
    return model, info


def load_folder(folder, labels):
    """A classifier with the weights of a local folder, in PaddleNLP's or Hugging Face's format.

    What it knows of a label, by its name, is kept; the classifier's other weights are new.
    """
    model = build_model(folder, len(labels))
    path, encoder = folder / WEIGHTS_FILE, model.base_model_prefix + "."
    new = weights_of(model)
    if path.exists():
        weights = load_weights(path)
        if not any(key.startswith(encoder) for key in weights):  # saved from the bare encoder
            weights = {encoder + key: value for key, value in weights.items()}
    else:
        path = folder
        weights = hugging_face.read_weights(folder, new, encoder)
    names = read_label_names(folder, labels)
    used = {name: value for name, value in new.items() if not name.startswith(encoder)}
    kept = {k: v for k, v in weights.items() if k in new and (k.startswith(encoder) or names)}
    if names:
        kept = fit_classifier(kept, model, names, labels, path)
    set_weights(model, {**used, **kept}, path)
    return model


# ------------------------------------------------------------------------------------- the labels
def read_label_names(folder, labels):
    """Label names in a folder's config.json, in the order of the logits; None if it has none, or
    only the LABEL_0, LABEL_1 ... that libraries write where nobody named them (and `labels`, the
    label file's, are others)."""
    path = Path(folder) / CONFIG_FILE
    names = read_json(path).get("id2label") if path.exists() else None
    if not isinstance(names, dict) or set(names) != set(map(str, range(len(names)))):
        return None
    names = [str(names[str(i)]) for i in range(len(names))]
    unnamed = names == [f"LABEL_{i}" for i in range(len(names))]
    return None if not names or unnamed and not set(names) & set(labels) else names


def check_same_labels(label_file, labels, names, where, advice):
    """The label file must hold the names that weights were trained with, in any order. Raises
    UserError that names the first difference; where: what has `names`."""
    known, listed = set(names), set(labels)
    for line, label in enumerate(labels, 1):
        if label not in known:
            why = f"label '{label}' is not among the {len(names)} labels of {where}"
            raise UserError(f"{label_file}:{line}: {why}; {advice}")
    for name in names:
        if name not in listed:
            raise UserError(f"{label_file}: label '{name}' of {where} is missing; {advice}")


def fit_classifier(weights, model, names, labels, where):
    """`weights` with the classifier [..., names] in the order of `labels`: a label's column goes
    with its name, and that of a label which is not among `names` is the model's. Logs what changes.
    """
    encoder = model.base_model_prefix + "."
    head = {name: value for name, value in weights.items() if not name.startswith(encoder)}
    if names == labels or not head:
        return weights
    new = {name: value.numpy() for name, value in model.state_dict().items() if name in head}
    check_shapes({k: (*v.shape[:-1], len(names)) for k, v in new.items()}, head, where)
    known, listed = {name: i for i, name in enumerate(names)}, set(labels)
    columns = [known.get(label, len(names) + i) for i, label in enumerate(labels)]
    fitted = {k: np.concatenate([head[k], new[k]], axis=-1)[..., columns] for k in head}
    starting = [label for label in labels if label not in known]
    unused = [name for name in names if name not in listed]
    if starting or unused:
        changes = [f"knows {len(labels) - len(starting)} of the {len(labels)} labels"]
        if starting:
            changes.append(f"{len(starting)} start(s) anew: {_first(starting)}")
        if unused:
            changes.append(f"{len(unused)} of its own not in the label file: {_first(unused)}")
        logger.warning("%s: the classifier %s", where, "; ".join(changes))
    else:
        message = "%s: the same %d labels in another order; the classifier takes the label file's"
        logger.info(message, where, len(labels))
    return {**weights, **fitted}


def _first(names):
    return ", ".join([*names[:SHOWN_LABELS], *(["..."] if len(names) > SHOWN_LABELS else [])])


# ------------------------------------------------------------------------------------- training
def make_optimizer(model, learning_rate, weight_decay, max_grad_norm):
    """AdamW without decay on biases and norms. learning_rate: a float or a Paddle schedule;
    max_grad_norm: gradients are clipped to it, 0: they are not."""
    named = model.named_parameters()
    decayed = {p.name for name, p in named if "bias" not in name and "norm" not in name}
    return paddle.optimizer.AdamW(
        learning_rate=learning_rate,
        parameters=model.parameters(),
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(max_grad_norm) if max_grad_norm else None,
    )


def scaled_backward(loss):
    """The backward pass; on the CPU all gradients come out LOSS_SCALE times as large.

    Masked keys have attention weights of 1e-30; times small gradients these are subnormal numbers,
    with which Intel processors multiply up to 50 times more slowly. A power of two changes nothing
    else: `unscale` takes it out exactly.
    """
    (loss * LOSS_SCALE if _on_cpu() else loss).backward()


@paddle.no_grad()
def unscale(parameters):
    """Takes LOSS_SCALE out of the gradients, in place."""
    if _on_cpu():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.scale_(1 / LOSS_SCALE)


def _on_cpu():
    return paddle.get_device() == "cpu"


@paddle.no_grad()
def average_gradients(parameters):
    """Mean over all ranks, in place; one exchange for all parameters."""
    if dist.get_world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    joined = paddle.concat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined.scale_(1 / dist.get_world_size())
    parts = joined.split([gradient.size for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.set_value(part.reshape(gradient.shape))


# ------------------------------------------------------- training: the rows of the embeddings
class _Rows(paddle.nn.Layer):
    """An embedding table that holds only some rows of the whole one."""

    def __init__(self, table, token_ids):
        super().__init__()
        row_of = np.zeros(table.weight.shape[0], dtype=np.int64)
        row_of[token_ids] = np.arange(len(token_ids))
        self.register_buffer("row_of", paddle.to_tensor(row_of), persistable=False)
        self.weight = _parameter(table.weight.numpy()[token_ids])
        self.padding_idx = table._padding_idx  # its row is the first one here, too

    def forward(self, input_ids):
        rows = paddle.gather(self.row_of, input_ids.flatten()).reshape(input_ids.shape)
        return F.embedding(rows, self.weight, self.padding_idx)


def _parameter(array):
    initializer = paddle.nn.initializer.Assign(array)
    return paddle.create_parameter(array.shape, "float32", default_initializer=initializer)


class EmbeddingRows:
    """Trains only the rows of the embeddings that the data uses: most parameters of a small model
    are embeddings, and a data set may use a tenth of the vocabulary.

    Cuts the tables of `net` in place. token_ids: those that occur, in ascending order, [PAD] first;
    length: of the longest sequence. The gradient of any other row is always 0, so the weight decay
    alone would change it.
    """

    def __init__(self, net, token_ids, length):
        self.net, layer = net, net.base_model.embeddings
        self.rows = {"word_embeddings": token_ids, "position_embeddings": np.arange(length)}
        self.full = {name: getattr(layer, name).weight.numpy() for name in self.rows}
        layer.word_embeddings = _Rows(layer.word_embeddings, token_ids)
        layer.position_embeddings.weight = _parameter(self.full["position_embeddings"][:length])

    def weights(self, decay):
        """{parameter name: float32 array} with the whole tables. decay: product of
        1 - learning rate * weight decay over all steps."""
        weights = weights_of(self.net)
        for name, rows in self.rows.items():
            full = (self.full[name] * decay).astype(np.float32)
            key = f"{self.net.base_model_prefix}.embeddings.{name}.weight"
            full[rows] = weights[key]
            weights[key] = full
        return weights


# ------------------------------------------------ training: a copy of the model for each core
class Replicas:
    """Copies of a model that share its weights and train on shares of a batch, each in a thread.

    Paddle computes most operators of a layer on a single core, so on the CPU there is a copy for
    each; elsewhere the model is the only one. Gradients are summed in the order of the copies, so
    that the same number of them gives the same bits.
    """

    def __init__(self, net, batch_size):
        self.nets = [net]
        if _on_cpu():
            _keep_freed_memory()
            for _ in range(1, min(num_threads(), batch_size // MIN_SHARE)):
                self.nets.append(copy.deepcopy(net))
                for own, shared in zip(self.nets[-1].parameters(), net.parameters()):
                    shared._share_buffer_to(own)
        self.pool = ThreadPoolExecutor(len(self.nets))

    def train(self):
        for net in self.nets:
            net.train()

    def map(self, function, indices, seed):
        """A list of function(copy, its share of the array `indices`) for all that have a share.

        seed: numpy.random.SeedSequence of dropout.
        """
        shares = [indices[i :: len(self.nets)] for i in range(min(len(self.nets), len(indices)))]

        def run(net, share, seed):
            seed_dropout(seed)
            return function(net, share)

        arguments = self.nets, shares, seed.spawn(len(shares))
        if len(self.nets) == 1:
            return list(map(run, *arguments))
        threads = num_threads()
        paddle.base.core.set_num_threads(threads // len(self.nets))  # of a matrix product
        try:
            return list(self.pool.map(run, *arguments))
        finally:
            paddle.base.core.set_num_threads(threads)

    def forward(self, **batch):
        """Logits of a batch in eval mode; see utils.run_batches."""

        def run(net, rows):
            return dygraph_forward(net)(**{name: array[rows] for name, array in batch.items()})

        indices = np.arange(len(batch["input_ids"]))
        shares = self.map(run, indices, np.random.SeedSequence(0))
        logits = np.empty([len(indices), shares[0].shape[1]], dtype=np.float32)
        for i, share in enumerate(shares):
            logits[i :: len(self.nets)] = share
        return logits

    @paddle.no_grad()
    def collect_gradients(self):
        """Adds the gradients of the copies to the model's."""
        for first, *others in zip(*(net.parameters() for net in self.nets)):
            for other in others:
                if other.grad is not None:
                    first.grad.add_(other.grad)
                    other.clear_gradient(set_to_zero=False)


def _keep_freed_memory():
    """Makes glibc keep what tensors free for the next ones. It would give large blocks back to the
    system, which hands them out again page by page: a twentieth of a step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((-4, 0), (-1, 1 << 30), (-2, 64 << 20)):
            libc.mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


# ------------------------------------------------------ training: faster layers on the CPU
# Paddle's kernels for these are slow on the CPU (benchmarks/step_profile.py); here they are put
# together from its fast ones. fast_layers puts them in the place of Paddle's own.
class _Linear(PyLayer):
    """x @ weight + bias. Paddle adds the bias in a pass of its own and sums its gradient slowly."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rows = x.reshape([-1, x.shape[-1]])
        ctx.save_for_backward(rows, weight)
        return paddle.addmm(bias.unsqueeze(0), rows, weight).reshape([*x.shape[:-1], -1])

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensor()
        flat = grad.reshape([-1, grad.shape[-1]])
        of_x = paddle.matmul(flat, weight, transpose_y=True)
        of_weight = paddle.matmul(rows, flat, transpose_x=True)
        return of_x.reshape([*grad.shape[:-1], -1]), of_weight, _column_sums(flat)


class _LayerNorm(PyLayer):
    """Paddle's own forward pass; the backward pass in matrix products and fewer passes over x."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return _layer_norm(x, weight.shape, weight, bias, epsilon)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        size = weight.shape[0]
        rows, flat = x.reshape([-1, size]), grad.reshape([-1, size])
        mean = paddle.full([size, 1], 1 / size, x.dtype)
        normal = rows - paddle.matmul(rows, mean)
        factor = paddle.rsqrt(paddle.matmul(normal * normal, mean) + ctx.epsilon)
        normal.multiply_(factor)
        product, weights = flat * normal, weight.unsqueeze(1) / size
        of_weight, of_bias = _column_sums(product), _column_sums(flat)
        # d x = factor * (g - mean(g) - normal * mean(g * normal)), where g = grad * weight
        result = flat * weight
        result.subtract_(paddle.matmul(flat, weights))
        result.subtract_(normal.multiply_(paddle.matmul(product, weights)))
        return result.multiply_(factor).reshape(x.shape), of_weight, of_bias


class _Attention(PyLayer):
    """softmax(q @ k^T + mask), dropout, @ v, of q, k, v [batch, heads, length, size].

    mask: [batch, heads, length, 1], what is added to the scores of a key: a column more of q and k,
    since adding it to the scores takes Paddle longer than their product. keep: factors of dropout
    [batch, heads, length, length], or None.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, keep):
        ones = paddle.ones_like(mask)
        scores = paddle.matmul(
            paddle.concat([q, ones], -1), paddle.concat([k, mask], -1), False, True
        )
        probs = F.softmax(scores)
        kept = probs if keep is None else probs * keep
        result = paddle.matmul(kept, v)
        ctx.keep = keep
        ctx.save_for_backward(q, k, v, probs, kept, result)
        return result

    @staticmethod
    def backward(ctx, grad):
        q, k, v, probs, kept, result = ctx.saved_tensor()
        of_v = paddle.matmul(kept, grad, transpose_x=True)
        of_scores = paddle.matmul(grad, v, transpose_y=True)
        if ctx.keep is not None:
            of_scores.multiply_(ctx.keep)
        # sum(d probs * probs) over the keys is sum(d result * result) over the size.
        of_scores.subtract_((grad * result).sum(-1, keepdim=True))
        of_scores.multiply_(probs)
        return paddle.matmul(of_scores, k), paddle.matmul(of_scores, q, transpose_x=True), of_v


def _column_sums(matrix):
    return paddle.matmul(paddle.ones([1, matrix.shape[0]], matrix.dtype), matrix).flatten()


_layer_norm, _plain_dropout = F.layer_norm, F.dropout
_random = threading.local()  # .rng: of the thread's share of a batch


def _linear_forward(layer, x):
    if layer.bias is None:
        return F.linear(x, layer.weight)
    return _Linear.apply(x, layer.weight, layer.bias)


def _layer_norm_forward(layer, x):
    return _LayerNorm.apply(x, layer.weight, layer.bias, layer._epsilon)


def _attention_forward(layer, query, key, value, attn_mask, cache=None):
    """Self-attention: query, key and value are the same tensor, and there is no cache."""
    batch, length, _ = query.shape
    heads, size = layer.num_heads, layer.head_dim

    def split(projection):
        return projection(query).reshape([batch, length, heads, size]).transpose([0, 2, 1, 3])

    mask = attn_mask.reshape([batch, 1, length, 1]).expand([batch, heads, length, 1])
    keep = None
    if layer.training and layer.dropout:
        keep = _keep_factors([batch, heads, length, length], layer.dropout)
    q = split(layer.q_proj) * size**-0.5
    result = _Attention.apply(q, split(layer.k_proj), split(layer.v_proj), mask, keep)
    return layer.out_proj(result.transpose([0, 2, 1, 3]).reshape([batch, length, heads * size]))


def _keep_factors(shape, rate):
    """Dropout's factors: 0 or 1 / (1 - rate).

    Paddle draws a float per element with a Mersenne twister, which takes a fifth of a step; here
    16 random bits decide, so a rate is rounded to a multiple of 1 / 65536.
    """
    dropped, size = round(rate * 65536), math.prod(shape)
    bits = _random.rng.bit_generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
    factors = np.multiply(bits >= dropped, np.float32(65536 / max(1, 65536 - dropped)))
    return paddle.to_tensor(factors.reshape(shape))


def _dropout(x, p=0.5, axis=None, training=True, mode="upscale_in_train", name=None, **more):
    if not training or p == 0:
        return x
    if axis is not None or mode != "upscale_in_train":
        return _plain_dropout(x, p, axis, training, mode, name, **more)
    return x * _keep_factors(x.shape, p)


def seed_dropout(seed):
    """Seeds the dropout of this thread. seed: a numpy.random.SeedSequence."""
    if _on_cpu():
        _random.rng = np.random.Generator(np.random.SFC64(seed))
    else:
        paddle.seed(int(seed.generate_state(1)[0]))


@contextlib.contextmanager
def fast_layers():
    """Inside the block linear layers, layer norms, attention and dropout on the CPU are the ones
    above, for all models; on other devices nothing changes."""
    if not _on_cpu():
        yield
        return
    nn = paddle.nn
    with contextlib.ExitStack() as stack:
        for owner, name, fast in (
            (nn.Linear, "forward", _linear_forward),
            (nn.LayerNorm, "forward", _layer_norm_forward),
            (nn.MultiHeadAttention, "forward", _attention_forward),
            (F, "dropout", _dropout),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, fast)
        yield


# ---------------------------------------------------------------------------------- evaluation
def evaluate(forward, encoded, label_ids, num_labels, batch_size):
    """Dev figures; the ranks share the batches, and the result does not depend on their number.

    forward: see utils.run_batches. Returns {"loss", "micro_f1", "macro_f1"}; loss is the mean over
    all texts and labels.
    """
    counts = metric.MultiLabelCounts(num_labels)
    losses = np.zeros(-(-len(encoded) // batch_size), dtype=np.float64)
    share = dist.get_rank(), dist.get_world_size()
    for batch, indices, logits in utils.run_batches(forward, encoded, batch_size, *share):
        targets = utils.multi_hot([label_ids[i] for i in indices], num_labels)
        counts.update(metric.decode(metric.probabilities(logits)), targets)
        losses[batch] = metric.bce_sum(logits, targets)
    counts = metric.MultiLabelCounts.from_array(all_reduce(counts.to_array()))
    loss = float(all_reduce(losses).sum()) / (len(encoded) * num_labels)
    return {"loss": loss, "micro_f1": counts.micro_f1, "macro_f1": counts.macro_f1}


# ----------------------------------------------------------------------------------------- save
def write_weights(path, model, weights=None):
    """weights: {parameter name: array} instead of the model's own."""
    if weights is None:
        weights = weights_of(model)
    with open(path, "wb") as file:
        save_weights(file, weights)


def save_checkpoint(save_dir, model, tokenizer_dir, weights=None):
    """The checkpoint: weights, tokenizer and config.json with labels and sequence length."""
    with utils.atomic_folder(save_dir) as folder:
        write_weights(folder / WEIGHTS_FILE, model, weights)
        model.config.save_pretrained(str(folder))
        utils.copy_tokenizer(tokenizer_dir, folder)


def save_static(model, prefix):
    """Traces the model in eval mode: int64 input_ids, token_type_ids [batch, length] to logits."""
    model.eval()
    inputs = [
        paddle.static.InputSpec([None, None], "int64", name)
        for name in ("input_ids", "token_type_ids")
    ]
    static_model = paddle.jit.to_static(model, input_spec=inputs, full_graph=True)
    with utils.native_path(prefix) as native:
        paddle.jit.save(static_model, str(native))
    # Paddle 2 names the output after its last operation, Paddle 3 after its number; every server
    # would have to know it.
    path, _ = utils.static_graph(prefix)
    if PIR:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"fetch_name_0"', '"logits"'), encoding="utf-8")
        return
    program = paddle.base.core.ProgramDesc(path.read_bytes())
    block = program.block(0)
    operations = [block.op(i) for i in range(block.op_size())]
    (output,) = (name for op in operations if op.type() == "fetch" for name in op.input("X"))
    block._rename_var(output.encode(), b"logits")
    path.write_bytes(program.serialize_to_string())


def write_bundle(folder, model, config, tokenizer_dir):
    """Writes the static graph and what inference needs beside it: tokenizer, labels, length.

    config: what config.json shall hold. Returns check(name, forward), which compares a forward's
    logits with the model's on random token ids of all lengths; the graph has passed it. Raises
    UserError if they differ by more than MAX_DIFFERENCE.
    """
    rng, longest = np.random.default_rng(0), config["max_seq_length"]
    lengths = np.linspace(2, longest, CHECK_SEQUENCES).astype(int)
    sequences = [rng.integers(1, config["vocab_size"], length) for length in lengths]  # 0: [PAD]
    num_labels = len(config["id2label"])

    def logits_of(forward):
        return utils.logits_of(forward, sequences, CHECK_BATCH, num_labels)

    expected = logits_of(dygraph_forward(model))  # static_forward takes the threads away

    def check(name, forward):
        difference = float(np.abs(logits_of(forward) - expected).max())
        where = f"on {CHECK_SEQUENCES} random sequences"
        if not difference <= MAX_DIFFERENCE:  # also when it is nan
            limit = f"more than {MAX_DIFFERENCE:g}; nothing was written"
            raise UserError(f"the logits of the {name} differ by {difference:.2e} {where}, {limit}")
        logger.info("Largest difference of a logit, %s and model: %.2e %s", name, difference, where)

    save_static(model, folder / PREFIX)
    utils.copy_tokenizer(tokenizer_dir, folder)
    # Binds config.json and the ONNX files to these weights.
    config = {**config, "model_sha256": utils.sha256(*utils.static_graph(folder / PREFIX))}
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    check("static graph", static_forward(folder / PREFIX))
    return check


def remove_old_graphs(folder, new_files):
    """Removes the graphs of the weights that were in the folder before: ONNX, another Paddle's."""
    suffixes = *utils.GRAPH_SUFFIXES, ".pdiparams.info"
    for name in [*utils.ONNX_FILES.values(), *(PREFIX + suffix for suffix in suffixes)]:
        if name not in new_files:
            (folder / name).unlink(missing_ok=True)
