"""Paddle Serving's pipeline server for a bundle, over gRPC and HTTP.

    python convert.py --dirname ../../export
    python service.py --config config.yml

The command runs the server in a child process and restarts it when it is lost. On SIGTERM or Ctrl-C
the server answers what it has accepted. It never outlives this process, not even after SIGKILL.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import types
from concurrent import futures
from pathlib import Path

import numpy as np
import yaml
from http_front import BAD_REQUEST, BUSY, NAME, NOT_READY, HttpServer, parse_texts

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from supervisor import POLL, Server, check_platform, check_port, keep_running

import utils
from utils import UserError, logger

PREFIX = "float32"
LENGTH_STEP = 16  # batches are padded to a multiple of it, with [PAD] = 0, which the model masks
SETTINGS = ("rpc_host", "rpc_port", "http_host", "http_port", "limits", "op")
LIMITS = (
    "max_body_bytes max_texts max_text_bytes max_requests receive_seconds drain_seconds".split()
)
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
    if args.worker:
        return worker(config)
    address = config["http_host"], config["http_port"]
    check_port(config["rpc_host"], config["rpc_port"])
    check_port(*address)
    command = [sys.executable, str(Path(__file__).resolve()), "--config", args.config, "--worker"]
    seconds = config["limits"]["drain_seconds"] + 10

    def start():
        return Server(command, address, f"/{NAME}/ready", seconds)

    sys.exit(keep_running(start, MAX_FAILED_STARTS))


def read_config(path):
    """The settings as a dict, model_config as an absolute path. Raises UserError."""
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = {name: config[name] for name in SETTINGS}
        op = config["op"][NAME]["local_service_conf"]
        numbers = {name: config["limits"][name] for name in LIMITS}
        numbers |= {name: config[name] for name in ("rpc_port", "http_port")}
        device_type, devices = op["device_type"], op["devices"]
        op["model_config"] = str(path.resolve().parent / op["model_config"])
        op["client_type"] = "local_predictor"
        # One model, and one process with the op in a thread, so that there is one to watch.
        config.update(worker_num=1, build_dag_each_worker=False, dag={"is_thread_op": True})
        config["op"][NAME].update(concurrency=1, batch_size=1, auto_batching_timeout=-1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error} missing or malformed; compare config.yml") from error
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name}: {value} is not a positive integer")
    if config["rpc_port"] == config["http_port"]:
        raise UserError(f"{path}: rpc_port and http_port are the same")
    if device_type not in (0, 1):
        raise UserError(f"{path}: device_type {device_type}: 0 (CPU) and 1 (GPU) are supported")
    if device_type == 1 and not str(devices).isdigit():
        raise UserError(f'{path}: devices "{devices}": give the number of one GPU, such as "0"')
    return config


# -------------------------------------------------------------------------------------- worker
def worker(config):
    """Serves until SIGTERM, then answers what was accepted."""
    servicer = make_servicer(config)
    import grpc
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2_grpc

    signals, limits = [], config["limits"]
    signal.signal(signal.SIGTERM, lambda *_: signals.append(True))  # after Paddle has set its own
    rpc = grpc.server(
        # More than max_requests, so that `ready` has a thread while all others are busy.
        futures.ThreadPoolExecutor(limits["max_requests"] + 4),
        options=[
            ("grpc.max_receive_message_length", limits["max_body_bytes"]),
            ("grpc.so_reuseport", 0),
        ],
    )
    pipeline_service_pb2_grpc.add_PipelineServiceServicer_to_server(servicer, rpc)
    rpc.add_insecure_port(f"{config['rpc_host']}:{config['rpc_port']}")
    http = HttpServer(config, servicer)
    rpc.start()
    threading.Thread(target=http.serve_forever, args=(0.1,), daemon=True).start()
    logger.info("Serving: gRPC port %d, HTTP port %d", config["rpc_port"], config["http_port"])
    while servicer.alive() and not signals:
        time.sleep(POLL)
    lost = not servicer.alive()
    end = rpc.stop(limits["drain_seconds"])
    http.drain(limits["drain_seconds"])
    end.wait()
    logging.shutdown()
    os._exit(1 if lost else 0)  # Paddle Serving's threads would go on


def import_pipeline():
    """Paddle Serving's pipeline package."""
    # It imports a client for its C++ server, which has no build for Python 3.10 and is not used.
    client = types.ModuleType("paddle_serving_client")
    client.Client = type("Client", (), {})
    sys.modules.setdefault("paddle_serving_client", client)
    try:
        from paddle_serving_server import pipeline
        from paddle_serving_server.pipeline import pipeline_server
    except ImportError as error:
        raise UserError(f"{error}; install what requirements.txt lists") from error
    # The library logs every request, in up to 16 GB of files, and switches other loggers off.
    logging.getLogger().setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.maxBytes, handler.backupCount = 10_000_000, 3
    logger.disabled = False
    # A file for its own stop command, which leaves orphans; a broken one would prevent the start.
    pipeline_server.dump_pid_file = lambda *_: None
    return pipeline


def make_servicer(config):
    """Paddle Serving's servicer of the DAG request - seq_cls - response, with the model loaded."""
    limits, settings = config["limits"], config["op"][NAME]["local_service_conf"]
    folder = Path(settings["model_config"])
    if not (folder / "serving_server_conf.prototxt").exists():
        raise UserError(f"{folder}: no model for Paddle Serving; run convert.py first")
    utils.static_graph_sha256(folder / PREFIX)
    info, tokenizer = utils.read_model_info(folder), utils.load_tokenizer(folder)
    pipeline = import_pipeline()
    import paddle
    from paddle_serving_server.pipeline.pipeline_server import PipelineServer, PipelineServicer
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2

    if settings["device_type"] == 1 and not paddle.is_compiled_with_cuda():
        raise UserError("device_type 1: this PaddlePaddle has no GPU support")  # it would use CPUs

    class Request(pipeline.RequestOp):
        """Accepts `sentence` only. The library's own also unpickles byte tensors of any client."""

        def unpack_request_package(self, request):
            try:
                if list(request.key) != ["sentence"] or len(request.value) != 1 or request.tensors:
                    raise ValueError('send key ["sentence"] with one value, no tensors')
                texts = parse_texts(request.value[0], limits)
            except ValueError as error:
                return {}, request.logid, BAD_REQUEST, str(error)
            return {"texts": texts}, request.logid, None, ""

    class SeqCls(pipeline.Op):
        labeller = None

        def start_with_thread(self):
            self.threads = super().start_with_thread()
            return self.threads

        def init_op(self):
            self.labeller = utils.Labeller(self.forward, tokenizer, info)

        def forward(self, **batch):
            # oneDNN keeps what it has compiled for a shape; with fewer shapes it finds it again.
            length = batch["input_ids"].shape[1]
            longer = min(-(-length // LENGTH_STEP) * LENGTH_STEP, info.max_position)
            batch = {k: np.pad(v, ((0, 0), (0, longer - length))) for k, v in batch.items()}
            (fetch,) = self.client.fetch_names_
            return self.client.predict(feed=batch, fetch=[fetch], batch=True)[fetch]

        def process(self, feed_batch, typical_logid=0):
            decisions, probs = self.labeller.decide(feed_batch[0]["texts"])
            scores = [
                [round(p, 6) for p in row[given].tolist()] for row, given in zip(probs, decisions)
            ]
            return {"label": self.labeller.names(decisions), "score": scores}, 0, ""

        def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
            reply = {k: json.dumps(v, ensure_ascii=False) for k, v in fetch_data.items()}
            return reply, None, ""

    class Servicer(PipelineServicer):
        """inference() is called by gRPC and by HTTP, each in a thread of its own."""

        Request = pipeline_service_pb2.Request
        slots = threading.BoundedSemaphore(limits["max_requests"])

        def alive(self):
            return all(t.is_alive() for t in [*op.threads, self._dag_executor._recive_func])

        def ready(self):
            return op.labeller is not None and self.alive()

        def inference(self, request, context):
            def error(err_no, err_msg=""):
                return pipeline_service_pb2.Response(err_no=err_no, err_msg=err_msg)

            # The library would write a wrong name into its log, whatever its size.
            if request.name not in ("", NAME) or request.method not in ("", "prediction", "ready"):
                return error(BAD_REQUEST, f"use the service {NAME}, prediction or ready")
            if request.method == "ready":
                return error(0 if self.ready() else NOT_READY)
            if not self.slots.acquire(blocking=False):
                return error(BUSY, "server busy; retry later")
            try:
                return super().inference(request, context)
            finally:
                self.slots.release()

    op = SeqCls(name=NAME, input_ops=[Request()])
    server = PipelineServer(NAME)
    server.set_response_op(pipeline.ResponseOp(input_ops=[op]))
    try:
        server.prepare_server(yml_dict={k: v for k, v in config.items() if k != "http_port"})
    except (SystemExit, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"config: {error}") from error
    return Servicer(NAME, server._response_op, config)


if __name__ == "__main__":
    utils.cli(main)
