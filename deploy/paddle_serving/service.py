"""Paddle Serving's pipeline server for a bundle, over gRPC and HTTP.

    python convert.py --dirname ../../export
    python service.py --config config.yml

The command runs the server in a child process and restarts it when it is lost. On SIGTERM or Ctrl-C
the server answers what it has accepted. It never outlives this process, not even after SIGKILL.
"""

import logging
import os
import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import yaml
from http_front import READY, make_front
from seq_cls import NAME, make_servicer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from supervisor import POLL, Server, check_platform, check_port, keep_running

import utils
from utils import UserError, logger

# What config.yml must hold, and what it may hold besides.
SETTINGS = ["rpc_host", "rpc_port", "http_host", "http_port", "limits", "op"]
LIMITS = (
    "max_body_bytes max_texts max_text_bytes max_requests receive_seconds drain_seconds".split()
)
DEFAULTS = {"log_dir": "."}
OP_DEFAULTS = {"engine": "auto", "concurrency": 1, "batch_size": 32}
MODEL_SETTINGS = ["model_config", "device_type", "devices"]
MODEL_OPTIONS = (
    "thread_num use_mkldnn mkldnn_cache_capacity mkldnn_op_list mkldnn_bf16_op_list ir_optim "
    "mem_optim precision".split()
)
LOG_FILE = "output.log"  # in the log folder: what the libraries print
MAX_LOG_BYTES = 10_000_000
MAX_FAILED_STARTS = 3  # in a row; then the supervisor gives up


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--config", default="config.yml", help="ports, limits, model, device")
    add("--worker", action="store_true", help="for service.py itself: be the child process")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    check_platform()
    config = read_config(args.config)
    log_file(config)
    if args.worker:
        return worker(config)
    address = config["http_host"], config["http_port"]
    check_port(config["rpc_host"], config["rpc_port"])
    check_port(*address)
    command = [sys.executable, str(Path(__file__).resolve()), "--config", args.config, "--worker"]
    seconds = config["limits"]["drain_seconds"] + 10

    def start():
        return Server(command, address, READY, seconds)

    sys.exit(keep_running(start, MAX_FAILED_STARTS))


def read_config(path):
    """The settings as a dict, with absolute paths and what was left out. Raises UserError."""
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_keys(path, "", config, SETTINGS, DEFAULTS)
        check_keys(path, "limits.", config["limits"], LIMITS)
        check_keys(path, "op.", config["op"], [NAME])
        op = config["op"][NAME]
        check_keys(path, f"op.{NAME}.", op, ["local_service_conf"], OP_DEFAULTS)
        model, where = op["local_service_conf"], f"op.{NAME}.local_service_conf."
        check_keys(path, where, model, MODEL_SETTINGS, MODEL_OPTIONS)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    config, op = DEFAULTS | config, OP_DEFAULTS | op
    model.setdefault("thread_num", 1)
    check_values(path, config, op, model)
    folder = path.resolve().parent
    model["model_config"] = str(folder / model["model_config"])
    config["log_dir"] = str(folder / config["log_dir"])
    if op["engine"] == "auto":
        has_onnx = (Path(model["model_config"]) / utils.ONNX_FILES["fp32"]).exists()
        op["engine"] = "onnxruntime" if has_onnx and model["device_type"] == 0 else "paddle"
    # One process with the op in threads, so that there is one to watch.
    config.update(worker_num=1, build_dag_each_worker=False, dag={"is_thread_op": True})
    model["client_type"] = "local_predictor"
    return config | {"op": {NAME: op | {"auto_batching_timeout": -1}}}


def check_keys(path, where, values, required, optional=()):
    """Raises UserError for a key that is missing or unknown. where: of the keys, "limits." say."""
    known = ", ".join([*required, *optional])
    if not isinstance(values, dict):
        what = where.rstrip(".") or "the file"
        raise UserError(f"{path}: {what} must have the keys {known}; compare config.yml")
    for name in values:
        if name not in required and name not in optional:
            raise UserError(f"{path}: {where}{name}: unknown key; known are {known}")
    for name in required:
        if values.get(name) is None:
            raise UserError(f"{path}: {where}{name} is missing; compare config.yml")


def check_values(path, config, op, model):
    numbers = {name: config["limits"][name] for name in LIMITS}
    numbers |= {name: config[name] for name in ("rpc_port", "http_port")}
    numbers |= {name: op[name] for name in ("concurrency", "batch_size")}
    numbers["thread_num"] = model["thread_num"]
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name}: {value} is not a positive integer")
    for name, value in (("log_dir", config["log_dir"]), ("model_config", model["model_config"])):
        if not isinstance(value, str):
            raise UserError(f"{path}: {name}: {value} is not the path of a folder")
    if config["rpc_port"] == config["http_port"]:
        raise UserError(f"{path}: rpc_port and http_port are the same")
    if op["engine"] not in ("auto", "paddle", "onnxruntime"):
        raise UserError(f"{path}: engine: {op['engine']}; known are auto, paddle, onnxruntime")
    device_type, devices = model["device_type"], model["devices"]
    if device_type not in (0, 1):
        raise UserError(f"{path}: device_type {device_type}: 0 (CPU) and 1 (GPU) are supported")
    if device_type == 1 and not str(devices).isdigit():
        raise UserError(f'{path}: devices "{devices}": give the number of one GPU, such as "0"')


def log_file(config):
    """Path of the file for what the libraries print; makes its folder. Raises UserError."""
    folder = Path(config["log_dir"]) / "PipelineServingLogs"  # the library's own choice
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG_FILE).touch()
    except OSError as error:
        raise UserError(
            f"log_dir: cannot write to {folder} ({error.strerror}); name another folder in "
            "config.yml"
        ) from error
    return folder / LOG_FILE


# -------------------------------------------------------------------------------------- worker
def redirect_output(path):
    """Python's stderr stays; what C++ code and `print` write goes to the file.

    Paddle prints a line for each of its passes, whatever its log level.
    """
    sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")
    if path.stat().st_size > MAX_LOG_BYTES:
        path.replace(f"{path}.1")
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def worker(config):
    """Serves until SIGTERM, then answers what was accepted."""
    redirect_output(log_file(config))
    logger.setLevel(logging.WARNING)  # the parent tells of the start and the stop
    servicer = make_servicer(config)
    import grpc
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2_grpc

    limits, front = config["limits"], make_front(servicer, config["limits"])

    def stop(*_):
        front.stopping = True

    signal.signal(signal.SIGTERM, stop)  # in place of Paddle's; the front sets its own later

    def refuse(request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping; retry elsewhere")

    class Refusal(grpc.ServerInterceptor):
        """For a moment before rpc.stop(), which cancels what arrives while it begins."""

        def intercept_service(self, continuation, details):
            if front.stopping:
                return grpc.unary_unary_rpc_method_handler(refuse)
            return continuation(details)

    rpc = grpc.server(
        # More than max_requests, so that `ready` has a thread while all others are busy.
        futures.ThreadPoolExecutor(limits["max_requests"] + 4),
        options=[
            ("grpc.max_receive_message_length", limits["max_body_bytes"]),
            ("grpc.so_reuseport", 0),
        ],
        interceptors=[Refusal()],
    )
    pipeline_service_pb2_grpc.add_PipelineServiceServicer_to_server(servicer, rpc)
    rpc.add_insecure_port(f"{config['rpc_host']}:{config['rpc_port']}")
    rpc.start()

    def watch():
        while servicer.alive() and not front.stopping:
            time.sleep(POLL)
        stop()
        time.sleep(front.limits.grace_seconds)
        rpc.stop(limits["drain_seconds"]).wait()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = front.run(config["http_host"], config["http_port"])
    watcher.join()
    logging.shutdown()
    os._exit(status if servicer.alive() else 1)  # Paddle Serving's threads would go on


if __name__ == "__main__":
    utils.cli(main)
