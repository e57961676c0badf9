"""Paddle Serving's pipeline server for a bundle, over gRPC and HTTP.

    python convert.py --dirname ../../export
    python service.py --config config.yml

The command runs the server in a child process, starts it anew when it is lost, and on SIGTERM lets
it answer what it has accepted; nothing is left behind, not even after SIGKILL.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent import futures
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import metric  # noqa: E402
import utils  # noqa: E402
from utils import UserError, logger  # noqa: E402

NAME = "seq_cls"  # of the service, in the path /seq_cls/prediction
PREFIX = "float32"
BAD_REQUEST = 51  # err_no; Paddle Serving keeps 51 to 99 for the application
BATCH_SIZE = 32  # texts per forward pass
LIMITS = ("max_body_bytes", "max_texts", "max_text_bytes", "max_requests", "drain_seconds")
QUICK_DEATH, MAX_QUICK_DEATHS = 20, 3  # seconds; then the supervisor gives up


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--config", default="config.yml", help="ports, limits, model, device")
    add("--worker", action="store_true", help="used by service.py itself: the child process")
    return parser.parse_args(argv)


def read_config(path):
    """The settings as a dict, model_config as an absolute path. Raises UserError."""
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        op = config["op"][NAME]["local_service_conf"]
        limits = {name: config["limits"][name] for name in LIMITS}
        numbers = {name: config[name] for name in ("rpc_port", "http_port", "worker_num")}
        op["model_config"] = str(path.resolve().parent / op["model_config"])
        device_type, config["dag"]["is_thread_op"] = op["device_type"], True
        config["rpc_host"] = str(config.get("rpc_host", "0.0.0.0"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {error} missing or malformed; compare config.yml") from error
    for name, value in {**limits, **numbers}.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {name}: {value} is not a whole number above 0")
    if device_type not in (0, 1):
        raise UserError(f"{path}: device_type {device_type}: 0 (CPU) and 1 (GPU) are supported")
    config["build_dag_each_worker"] = False
    return config


def check_model(folder):
    """Raises UserError if serving_server/ is not whole."""
    for name in (f"{PREFIX}.pdmodel", "serving_server_conf.prototxt"):
        if not (Path(folder) / name).exists():
            raise UserError(f"{folder}/{name}: no such file; run convert.py first")
    utils.static_graph_sha256(Path(folder) / PREFIX)
    utils.load_tokenizer(folder)


# ------------------------------------------------------------------------------------ requests
def parse_texts(value, limits):
    """The texts of a request's JSON: one string or a list of strings. Raises ValueError."""
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sentence is not JSON ({error}); send a string or a list") from error
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("sentence must be a JSON string or a list of strings")
    if not texts:
        raise ValueError("sentence is an empty list; send at least one text")
    if len(texts) > limits["max_texts"]:
        raise ValueError(f"{len(texts)} texts; send at most {limits['max_texts']} in one request")
    for i, text in enumerate(texts):
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"text {i} is not valid Unicode ({error.reason})") from error
        if size > limits["max_text_bytes"]:
            raise ValueError(f"text {i} has {size} bytes; at most {limits['max_text_bytes']}")
    return texts


# -------------------------------------------------------------------------------------- worker
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
    # The library logs every request (512 MB in each of 20 files) and switches other loggers off.
    logging.getLogger().setLevel(logging.WARNING)
    logger.disabled = False
    # A file for its own stop command, which leaves orphans; a broken one would prevent the start.
    pipeline_server.dump_pid_file = lambda *_: None
    return pipeline


def make_server(config):
    """(Paddle Serving's server with the DAG request - seq_cls - response, the op)."""
    pipeline, limits = import_pipeline(), config["limits"]
    from paddle_serving_server.pipeline.pipeline_server import PipelineServer, PipelineServicer
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2

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
        def init_op(self):
            folder = Path(self.model_config)
            self.info, self.tokenizer = utils.read_model_info(folder), utils.load_tokenizer(folder)
            self.ready = True

        def forward(self, **batch):
            (fetch,) = self.client.fetch_names_
            return self.client.predict(feed=batch, fetch=[fetch], batch=True)[fetch]

        def preprocess(self, input_dicts, data_id=0, log_id=0):
            (request,) = input_dicts.values()
            encoded, _ = utils.encode(request["texts"], self.tokenizer, self.info.max_seq_length)
            return {"encoded": encoded}, False, None, ""

        def process(self, feed_batch, typical_logid=0):
            encoded, num_labels = feed_batch[0]["encoded"], len(self.info.labels)
            return {"logits": utils.logits_of(self.forward, encoded, BATCH_SIZE, num_labels)}, 0, ""

        def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
            probs = metric.probabilities(fetch_data["logits"])
            decisions = metric.decode(probs, self.info.thresholds)
            names = metric.label_names(decisions, self.info.labels)
            scores = [[round(float(p), 6) for p in r[d > 0]] for r, d in zip(probs, decisions)]
            reply = {"label": json.dumps(names, ensure_ascii=False), "score": json.dumps(scores)}
            return reply, None, ""

    class Servicer(PipelineServicer):
        def inference(self, request, context):
            if request.method == "ready":
                return pipeline_service_pb2.Response(err_no=0 if op.ready else BAD_REQUEST)
            if request.method not in ("", "prediction"):
                message = f"no method {request.method}; use prediction or ready"
                return pipeline_service_pb2.Response(err_no=BAD_REQUEST, err_msg=message)
            return super().inference(request, context)

    op = SeqCls(name=NAME, input_ops=[Request()])
    op.ready = False
    server = PipelineServer(NAME)
    server.set_response_op(pipeline.ResponseOp(input_ops=[op]))
    return server, Servicer


def worker(config):
    """Serves until SIGTERM, then answers what was accepted. Ends with the supervisor."""
    threading.Thread(target=end_with_supervisor, daemon=True).start()
    op = config["op"][NAME]["local_service_conf"]
    check_model(op["model_config"])
    server, servicer_class = make_server(config)
    import grpc
    import paddle
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2_grpc

    if op["device_type"] == 1 and not paddle.is_compiled_with_cuda():
        raise UserError("device_type 1: this PaddlePaddle has no GPU support")  # it would use CPUs
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # after Paddle has set its own
    server.prepare_server(yml_dict=config)
    rpc_port, http_port = config["rpc_port"], config["http_port"]
    server._run_grpc_gateway(rpc_port, http_port)  # a child process; before gRPC has threads
    limits = config["limits"]
    rpc = grpc.server(
        futures.ThreadPoolExecutor(config["worker_num"]),
        options=[
            ("grpc.max_receive_message_length", limits["max_body_bytes"]),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=limits["max_requests"],
    )
    servicer = servicer_class(NAME, server._response_op, config)
    pipeline_service_pb2_grpc.add_PipelineServiceServicer_to_server(servicer, rpc)
    rpc.add_insecure_port(f"{config['rpc_host']}:{rpc_port}")
    rpc.start()
    logger.info("Serving on gRPC port %d and HTTP port %d", rpc_port, http_port)
    gateway = server._proxy_server
    while gateway.is_alive() and not stopping.wait(0.2):
        pass
    lost = not gateway.is_alive()
    rpc.stop(limits["drain_seconds"]).wait()
    time.sleep(0.5)  # the gateway passes the last answers on
    gateway.kill()
    logging.shutdown()
    os._exit(1 if lost else 0)  # Paddle Serving's threads would go on


def end_with_supervisor():
    """The supervisor holds the other end of stdin; it is closed when that process is gone."""
    os.read(0, 1)  # sys.stdin would be locked in the gateway's process, which closes it
    os.killpg(0, signal.SIGKILL)


# ---------------------------------------------------------------------------------- supervisor
def supervise(config, config_path):
    """Keeps a worker running; returns the exit status after SIGTERM or SIGINT."""
    stopping, worker = threading.Event(), None

    def stop(*_):
        stopping.set()
        if worker:
            worker.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    quick_deaths = 0
    while not stopping.is_set():
        start = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--config", config_path]
        # A session of its own: Paddle Serving kills its whole process group when it fails to start.
        worker = subprocess.Popen(
            [*command, "--worker"], stdin=subprocess.PIPE, start_new_session=True
        )
        if stopping.is_set():
            worker.terminate()
        status = wait(worker, stopping, config["limits"]["drain_seconds"])
        kill_group(worker.pid)  # the gateway outlives a worker that was killed
        if stopping.is_set():
            return status
        if status == 2:
            return 2  # the worker has said why
        quick_deaths = quick_deaths + 1 if time.monotonic() - start < QUICK_DEATH else 0
        if quick_deaths == MAX_QUICK_DEATHS:
            raise UserError("the server ends as soon as it starts; see PipelineServingLogs/")
        logger.error("The server was lost (exit status %d); it is started anew", status)
    return 0


def wait(worker, stopping, drain_seconds):
    """Exit status of the worker; after a stop it has `drain_seconds` and is then killed."""
    while not stopping.is_set():
        try:
            return worker.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
    try:
        return worker.wait(timeout=drain_seconds + 10)
    except subprocess.TimeoutExpired:
        logger.error("The server did not end in time and is killed")
        return 1


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main(argv=None):
    args = parse_args(argv)
    config = read_config(args.config)
    if args.worker:
        return worker(config)
    check_model(config["op"][NAME]["local_service_conf"]["model_config"])
    for name in ("rpc_port", "http_port"):
        check_port(name, config[name])
    sys.exit(supervise(config, args.config))


def check_port(name, port):
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(f"{name} {port} cannot be used: {error}") from error


if __name__ == "__main__":
    utils.cli(main)
