"""ONNX Runtime on an exported bundle: CPU fp32 and int8, GPU fp32 and fp16.

    predictor = Predictor("export/float32", device="cpu", precision="int8")
    names, probs = predictor.predict(["婚后生育一子。"])

Paddle is not needed once the bundle holds model.onnx. What is missing is made once, from the static
graph or from model.onnx, and kept in the bundle; every ONNX file names the SHA-256 of the static
graph that it comes from, so that a file of other weights is never used.
"""

import contextlib
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import onnxruntime as ort

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import utils
from utils import UserError, logger

OPSET = 13
INPUTS = ["input_ids", "token_type_ids"]
PYTHON = sys.version_info[:2]
ort.set_default_logger_severity(3)  # errors: it notes every constant that it folds


def bundle_folder(prefix):
    """The folder of a static graph; raises UserError if the prefix lacks the name of the graph."""
    if Path(prefix).is_dir():
        raise UserError(f"{prefix} is a folder; give the prefix of its files, {prefix}/float32")
    return Path(prefix).parent


# ----------------------------------------------------------------------------------- ONNX files
def make_onnx(prefix, precision):
    """Writes the bundle's ONNX file of one precision; makes model.onnx first if it is not there.

    Raises UserError if the static graph is missing or is not the one that config.json describes, if
    a package is missing, or if the bundle can't be written.
    """
    folder = Path(prefix).parent
    path = folder / utils.ONNX_FILES[precision]
    logger.info("Make %s (once)", path)
    onnx = _import("onnx", f"making {path.name}")
    if precision == "fp32":
        source, convert, sha256 = prefix, _convert, utils.static_graph_sha256(prefix)
    else:
        source = folder / utils.ONNX_FILES["fp32"]
        convert = {"int8": _quantize, "fp16": _to_fp16}[precision]
        sha256 = utils.read_model_info(folder).model_sha256
        if not source.exists() or _made_from(_load_onnx(source)) != sha256:
            make_onnx(prefix, "fp32")
    try:
        with (
            tempfile.TemporaryDirectory() as temporary,
            utils.native_path(source) as native,
            _stdout_to_stderr(),
        ):
            convert(native, Path(temporary) / "result.onnx")
            model = onnx.load(str(Path(temporary) / "result.onnx"))
    except UserError:
        raise
    except Exception as error:  # the converters raise almost anything
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"
        raise UserError(
            f"cannot make {path}: {reason}; is there room in {tempfile.gettempdir()}? (TMPDIR "
            "names another folder)"
        ) from error
    if _made_from(model) is None:
        model.metadata_props.add(key="model_sha256", value=sha256)
    with utils.atomic_file(path, "wb") as file:
        file.write(model.SerializeToString())


@contextlib.contextmanager
def _stdout_to_stderr():
    """The converters print notes, also from C++; stdout is for results."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _import(name, why):
    """A package that only making files needs."""
    try:
        return __import__(name)
    except ImportError as error:
        if name == "paddle2onnx" and PYTHON >= (3, 13):
            raise UserError(
                f"{why} needs paddle2onnx, which has no release for Python {PYTHON[0]}.{PYTHON[1]};"
                " run export_model.py --onnx on the checkpoint with Python 3.12, and take that "
                "bundle"
            ) from error
        raise UserError(
            f"{why} needs the package {name} (pip install {name}), or a bundle that holds the file "
            f"already; export_model.py --onnx writes {utils.ONNX_FILES['fp32']}"
        ) from error


def _load_onnx(path):
    import onnx

    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError and others
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    reason = str(error).strip().splitlines()[0]
    return UserError(f"{path}: not a readable ONNX model ({reason}); delete it or export again")


def _made_from(model):
    return next((p.value for p in model.metadata_props if p.key == "model_sha256"), None)


def _convert(prefix, path):
    """Static graph to ONNX. ONNX Runtime's clean-up then folds constants and turns the weights,
    which paddle2onnx writes as Constant nodes (the embeddings twice), into initializers: without it
    the quantiser would find nothing to quantise."""
    paddle2onnx = _import("paddle2onnx", f"making {utils.ONNX_FILES['fp32']}")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    version, raw = importlib.metadata.version("paddle2onnx"), path.with_name("raw.onnx")
    graph, weights = map(str, utils.static_graph(prefix))
    if graph.endswith(".json") and version.startswith("1."):
        raise UserError(
            f"{Path(graph).name}: written by Paddle 3, which paddle2onnx {version} cannot read; "
            "export the checkpoint with Paddle 3 and --onnx"
        )
    # With a file name paddle2onnx 2 would optimise the model, and install what that needs.
    raw.write_bytes(
        paddle2onnx.export(graph, weights, opset_version=OPSET, enable_onnx_checker=True)
    )
    quant_pre_process(str(raw), str(path), skip_symbolic_shape=True)


def _quantize(source, path):
    """Dynamic int8 of every MatMul with weights, and of the embeddings.

    One scale per output column. 7 bits a weight (reduce_range): on processors without VNNI the sum
    of two 8-bit products overflows 16 bits, and the file may be served on another machine.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(source),
        str(path),
        op_types_to_quantize=["MatMul", "Gather"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )


def _to_fp16(source, path):
    """Half precision inside, float32 logits outside."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(path))


# -------------------------------------------------------------------------------------- sessions
def open_session(prefix, precision="fp32", device="cpu", device_id=0, num_threads=None):
    """An ONNX Runtime session of a bundle; makes the ONNX file if there is none of these weights.

    num_threads: CPU threads, None for all cores. Several processes may call this at once: one makes
    the file, the others wait for it. Raises UserError.
    """
    folder = bundle_folder(prefix)
    if utils.read_model_info(folder).model_sha256 is None:
        raise UserError(f"{folder}: a checkpoint, not a bundle; run export_model.py on it")
    others = [file for file in folder.glob("*.pdiparams") if file.stem != Path(prefix).name]
    names = [Path(prefix).name + suffix for suffix in utils.GRAPH_SUFFIXES]
    if others and not any((folder / name).exists() for name in names):
        raise UserError(f"{prefix}: no {' or '.join(names)} there; check --model_path_prefix")
    path = folder / utils.ONNX_FILES[precision]
    args = path, device, device_id, num_threads or utils.num_cores()
    session = _current_session(*args)
    if session is None:
        try:
            with utils.folder_lock(folder):
                session = _current_session(*args)  # another process may have made it meanwhile
                if session is None:
                    make_onnx(prefix, precision)
                    session = _current_session(*args)
        except OSError as error:
            raise UserError(
                f"cannot make {path}: {error.strerror or error}; run once where the bundle can be "
                f"written, and copy {path.name} from there"
            ) from error
    if session is None:
        raise UserError(f"{folder}: changed while {path.name} was made; run the command again")
    return session


def _current_session(path, device, device_id, num_threads):
    """The session of an ONNX file; None if it is missing or was made from other weights."""
    if not path.exists():
        return None
    info = utils.read_model_info(path.parent)
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    providers = ["CPUExecutionProvider"]
    if device == "gpu":
        providers = [("CUDAExecutionProvider", {"device_id": device_id}), *providers]
    try:
        with utils.native_path(path) as native, _stdout_to_stderr():
            if device == "gpu" and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA's libraries may be Python packages
            # A GPU that fails, now or later, would be replaced by the CPU.
            session = ort.InferenceSession(native, options, providers, enable_fallback=0)
        session.disable_fallback()
    except Exception as error:  # its exceptions share no base class
        if device == "gpu" and "device ID" in str(error):
            raise UserError(f"--device_id {device_id}: no such GPU; see nvidia-smi -L") from error
        if device == "gpu" and "CUDA" in str(error):
            raise _no_cuda(str(error).splitlines()[0]) from error
        raise _unreadable(path, error) from error
    if device == "gpu" and "CUDAExecutionProvider" not in session.get_providers():
        raise _no_cuda(f"its libraries cannot be loaded, or there is no GPU {device_id}")
    meta = session.get_modelmeta().custom_metadata_map
    if meta.get("model_sha256") != info.model_sha256:
        return None
    classes = session.get_outputs()[0].shape[-1]
    named = len(info.labels)
    if [i.name for i in session.get_inputs()] != INPUTS or classes != named:
        raise UserError(f"{path}: {classes} classes, {named} labels in config.json; export again")
    return session


def _no_cuda(why):
    return UserError(
        f"--device gpu: ONNX Runtime's CUDA provider is not usable ({why}); use --device cpu, or "
        "install onnxruntime-gpu in place of onnxruntime, with the CUDA and cuDNN it was built for"
    )


def check_device(device):
    """Raises UserError early, before any file is read or made, if there is no CUDA provider."""
    if device == "gpu" and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise _no_cuda("this build has none")


def onnx_forward(session):
    """Forward of an ONNX Runtime session; see utils.run_batches."""

    def forward(input_ids, token_type_ids):
        return session.run(None, {"input_ids": input_ids, "token_type_ids": token_type_ids})[0]

    return forward


class Predictor(utils.Labeller):
    """Texts to labels with the ONNX model of a bundle.

    model_path_prefix: the static graph's path without its suffix, e.g. export/float32.
    precision: fp32, int8 (CPU) or fp16 (GPU). tokenizer_path: a folder with vocab.txt.
    max_seq_length, min_labels and max_labels (of a text; see metric.decode) come from the bundle
    unless given. long_text: see utils.Labeller, whose methods label the texts. Raises UserError for
    a broken bundle.
    """

    def __init__(
        self,
        model_path_prefix,
        device="cpu",
        precision="fp32",
        device_id=0,
        num_threads=None,
        batch_size=32,
        max_seq_length=None,
        tokenizer_path=None,
        min_labels=None,
        max_labels=None,
        long_text="truncate",
    ):
        folder = bundle_folder(model_path_prefix)
        check_device(device)
        info = utils.read_model_info(folder)
        info = info.with_settings(max_seq_length, min_labels=min_labels, max_labels=max_labels)
        tokenizer = utils.load_tokenizer(tokenizer_path or folder, folder)
        logger.info(">>> [InferBackend] Creating Engine ...")
        logger.info(">>> [InferBackend] Use %s to inference ...", device.upper())
        if precision != "fp32":
            logger.info(">>> [InferBackend] Use %s to inference ...", precision.upper())
        session = open_session(model_path_prefix, precision, device, device_id, num_threads)
        super().__init__(onnx_forward(session), tokenizer, info, batch_size, long_text)
        logger.info(">>> [InferBackend] Engine Created ...")
