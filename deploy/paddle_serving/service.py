"""Paddle Serving's pipeline server for a bundle, over gRPC and HTTP.

    python convert.py --dirname ../../export
    python service.py --config config.yml

The command runs the server in a child process, starts it anew when it is lost, and on SIGTERM lets
it answer what it has accepted; nothing is left behind, not even after SIGKILL. HTTP is served by
this file and not by Paddle Serving's gateway, which reads bodies of any size into memory, has no
time limit, listens on all addresses and exists for x86 only.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import metric  # noqa: E402
import utils  # noqa: E402
from utils import UserError, logger  # noqa: E402

NAME = "seq_cls"  # of the service, in the path /seq_cls/prediction
PREFIX = "float32"
BAD_REQUEST, BUSY, NOT_READY = 51, 52, 53  # err_no; 51 to 99 are the application's
BATCH_SIZE = 32  # texts per forward pass
LENGTH_STEP = 16  # batches are padded to a multiple of it, with [PAD] = 0, which the model masks
LIMITS = (
    *("max_body_bytes", "max_texts", "max_text_bytes"),
    *("max_requests", "receive_seconds", "drain_seconds"),
)
MAX_DISCARDED = 1 << 24  # bytes of a body that is too large
MAX_FAILED_STARTS = 3  # in a row; then the supervisor gives up


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--config", default="config.yml", help="ports, limits, model, device")
    add("--worker", type=int, help="used by service.py itself: a pipe of the child process")
    return parser.parse_args(argv)


def read_config(path):
    """The settings as a dict, model_config as an absolute path. Raises UserError."""
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        op = config["op"][NAME]["local_service_conf"]
        limits = {name: config["limits"][name] for name in LIMITS}
        ports = {name: config[name] for name in ("rpc_port", "http_port")}
        hosts = {name: config[name] for name in ("rpc_host", "http_host")}
        op["model_config"] = str(path.resolve().parent / op["model_config"])
        device_type, devices = op["device_type"], op["devices"]
        # One model, and one process with the op in a thread, so that there is one to watch.
        config.update(worker_num=1, build_dag_each_worker=False)
        config["dag"] = {"is_thread_op": True, "retry": 1, "use_profile": False, "tracer": {}}
        config["op"][NAME].update(concurrency=1, batch_size=1, auto_batching_timeout=-1)
        op.update(client_type="local_predictor")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error} missing or malformed; compare config.yml") from error
    for name, value in {**limits, **ports}.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name}: {value} is not a whole number above 0")
    for name, value in hosts.items():
        if not isinstance(value, str):
            raise UserError(f"{path}: {name}: {value} is not an address such as 127.0.0.1")
    if ports["rpc_port"] == ports["http_port"]:
        raise UserError(f"{path}: rpc_port and http_port are the same")
    if device_type not in (0, 1):
        raise UserError(f"{path}: device_type {device_type}: 0 (CPU) and 1 (GPU) are supported")
    if device_type == 1 and not str(devices).isdigit():
        raise UserError(f'{path}: devices "{devices}": give the number of one GPU, such as "0"')
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


# ------------------------------------------------------------------------------------- pipeline
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
        ready = False

        def start_with_thread(self):
            self.threads = super().start_with_thread()
            return self.threads

        def init_op(self):
            folder = Path(self.model_config)
            self.info, self.tokenizer = utils.read_model_info(folder), utils.load_tokenizer(folder)
            self.ready = True

        def forward(self, **batch):
            # oneDNN keeps what it has compiled for a shape; with fewer shapes it finds it again.
            length = batch["input_ids"].shape[1]
            longer = min(-(-length // LENGTH_STEP) * LENGTH_STEP, self.info.max_position)
            batch = {k: np.pad(v, ((0, 0), (0, longer - length))) for k, v in batch.items()}
            (fetch,) = self.client.fetch_names_
            return self.client.predict(feed=batch, fetch=[fetch], batch=True)[fetch]

        def preprocess(self, input_dicts, data_id=0, log_id=0):
            (request,) = input_dicts.values()
            encoded, length = [], self.info.max_seq_length
            for texts in utils.chunks(request["texts"], 4):  # long ones would need much memory
                encoded += utils.encode(texts, self.tokenizer, length)[0]
            return {"encoded": encoded}, False, None, ""

        def process(self, feed_batch, typical_logid=0):
            encoded, num_labels = feed_batch[0]["encoded"], len(self.info.labels)
            return {"logits": utils.logits_of(self.forward, encoded, BATCH_SIZE, num_labels)}, 0, ""

        def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
            probs = metric.probabilities(fetch_data["logits"])
            decisions = metric.decode(probs, **self.info.rule)
            names = metric.label_names(decisions, self.info.labels)
            scores = [[round(float(p), 6) for p in r[d > 0]] for r, d in zip(probs, decisions)]
            reply = {"label": json.dumps(names, ensure_ascii=False), "score": json.dumps(scores)}
            return reply, None, ""

    class Servicer(PipelineServicer):
        """inference() is called by gRPC and by HTTP, each in a thread of its own."""

        def __init__(self, *args):
            super().__init__(*args)
            self.slots = threading.BoundedSemaphore(limits["max_requests"])

        def alive(self):
            return all(t.is_alive() for t in [*op.threads, self._dag_executor._recive_func])

        def error(self, err_no, err_msg):
            return pipeline_service_pb2.Response(err_no=err_no, err_msg=err_msg)

        def inference(self, request, context):
            # The library would write a wrong name into its log, whatever its size.
            if request.name not in ("", NAME) or request.method not in ("", "prediction", "ready"):
                return self.error(BAD_REQUEST, f"use the service {NAME}, prediction or ready")
            if request.method == "ready":
                return self.error(0, "") if op.ready and self.alive() else self.error(NOT_READY, "")
            if not self.slots.acquire(blocking=False):
                return self.error(BUSY, "too many requests; come again")
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


# ----------------------------------------------------------------------------------------- HTTP
class HttpServer(ThreadingHTTPServer):
    """POST /seq_cls/prediction and GET /seq_cls/ready, with the requests of Paddle Serving."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, config, servicer):
        self.servicer, self.limits = servicer, config["limits"]
        self.stopping, self.active, self.lock = False, 0, threading.Lock()
        self.connections = threading.BoundedSemaphore(2 * self.limits["max_requests"])
        super().__init__((config["http_host"], config["http_port"]), HttpHandler)

    def process_request(self, request, client_address):
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request, client_address):
        """A client that goes away is no event; the library would print a traceback."""

    def count(self, change):
        with self.lock:
            self.active += change

    def drain(self, seconds):
        """Accepts no more, waits for the requests that are being answered."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        while self.active and time.monotonic() < deadline:
            time.sleep(0.05)


class HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True

    def setup(self):
        self.timeout = self.server.limits["receive_seconds"]
        super().setup()

    def log_message(self, *_):
        pass

    def reply(self, status, err_no=BAD_REQUEST, err_msg="", key=(), value=()):
        reply = {"err_no": err_no, "err_msg": err_msg, "key": [*key], "value": [*value]}
        body = json.dumps(reply, ensure_ascii=False).encode()
        self.close_connection |= self.server.stopping or status in (411, 413)
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        from paddle_serving_server.pipeline.proto import pipeline_service_pb2

        if self.path != f"/{NAME}/ready":
            return self.reply(404, err_msg=f"use POST /{NAME}/prediction or GET /{NAME}/ready")
        request = pipeline_service_pb2.Request(method="ready")
        err_no = self.server.servicer.inference(request, None).err_no
        err_no = NOT_READY if self.server.stopping else err_no
        self.reply(503 if err_no else 200, err_no)

    def do_POST(self):
        self.server.count(1)
        try:
            self.answer()
        finally:
            self.server.count(-1)

    def answer(self):
        length, most = self.headers.get("Content-Length", ""), self.server.limits["max_body_bytes"]
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            return self.reply(411, err_msg="send a body with Content-Length")
        if int(length) > most:
            rest = min(int(length), MAX_DISCARDED)  # most clients read an answer only after that
            while rest > 0 and (part := self.rfile.read(min(rest, 1 << 16))):
                rest -= len(part)
            return self.reply(413, err_msg=f"the body has {length} bytes; at most {most}")
        body = self.rfile.read(int(length))
        if self.path != f"/{NAME}/prediction":
            return self.reply(404, err_msg=f"use POST /{NAME}/prediction or GET /{NAME}/ready")
        if len(body) < int(length):
            self.close_connection = True  # the client has gone
            return None
        from paddle_serving_server.pipeline.proto import pipeline_service_pb2

        try:
            content = json.loads(body.decode("utf-8"))
            if not isinstance(content, dict):
                raise TypeError("not an object")
            key, value = content.get("key", []), content.get("value", [])
            if not isinstance(key, list) or not isinstance(value, list):
                raise TypeError("key and value must be lists")
            request = pipeline_service_pb2.Request(key=key, value=value)
        except (ValueError, TypeError, RecursionError) as error:
            return self.reply(400, err_msg=f"the body is not a request in UTF-8 JSON: {error}")
        if "tensors" in content:
            return self.reply(400, err_msg="tensors are not accepted")
        if self.server.stopping:
            return self.reply(503, NOT_READY, "the server is stopping")
        answer = self.server.servicer.inference(request, None)
        status = {0: 200, BAD_REQUEST: 400, BUSY: 429}.get(answer.err_no, 500)
        self.reply(status, answer.err_no, answer.err_msg, answer.key, answer.value)


# -------------------------------------------------------------------------------------- worker
def worker(config, pipe):
    """Serves until SIGTERM, then answers what was accepted. Ends with the supervisor."""
    threading.Thread(target=end_with_supervisor, daemon=True).start()
    op, limits = config["op"][NAME]["local_service_conf"], config["limits"]
    check_model(op["model_config"])
    servicer = make_servicer(config)
    import grpc
    import paddle
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2_grpc

    if op["device_type"] == 1 and not paddle.is_compiled_with_cuda():
        raise UserError("device_type 1: this PaddlePaddle has no GPU support")  # it would use CPUs
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # after Paddle has set its own
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
    threading.Thread(target=http.serve_forever, args=(0.1,), daemon=True).start()
    rpc.start()
    os.write(pipe, b"1")
    logger.info("Serving: gRPC port %d, HTTP port %d", config["rpc_port"], config["http_port"])
    while servicer.alive() and not stopping.wait(0.2):
        pass
    lost = not servicer.alive()
    end = rpc.stop(limits["drain_seconds"])
    http.drain(limits["drain_seconds"])
    end.wait()
    logging.shutdown()
    os._exit(1 if lost else 0)  # Paddle Serving's threads would go on


def end_with_supervisor():
    """The supervisor holds the other end of stdin; it is closed when that process is gone."""
    os.read(0, 1)
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
    failed_starts = 0
    while not stopping.is_set():
        reading, writing = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--config", config_path]
        # A session of its own: Paddle Serving kills its whole process group when it fails to start.
        worker = subprocess.Popen(
            [*command, "--worker", str(writing)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[writing],
        )
        os.close(writing)
        if stopping.is_set():
            worker.terminate()
        status = wait(worker, stopping, config["limits"]["drain_seconds"])
        kill_group(worker.pid)
        if stopping.is_set():
            return 1 if status is None else 0
        if status == 2:
            return 2  # the worker has said why
        failed_starts = 0 if os.read(reading, 1) else failed_starts + 1
        os.close(reading)
        if failed_starts == MAX_FAILED_STARTS:
            raise UserError("the server ends as soon as it starts; see above")
        logger.error("The server was lost (exit status %d); it is started anew", status)
    return 0


def wait(worker, stopping, drain_seconds):
    """Exit status of the worker; None if it does not end after a stop and has to be killed."""
    while not stopping.is_set():
        try:
            return worker.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
    try:
        return worker.wait(timeout=drain_seconds + 10)
    except subprocess.TimeoutExpired:
        logger.error("The server did not end in time and is killed")
        return None


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main(argv=None):
    args = parse_args(argv)
    config = read_config(args.config)
    if args.worker is not None:
        return worker(config, args.worker)
    check_model(config["op"][NAME]["local_service_conf"]["model_config"])
    for kind in ("rpc", "http"):
        check_port(kind, config[f"{kind}_host"], config[f"{kind}_port"])
    sys.exit(supervise(config, args.config))


def check_port(kind, host, port):
    """Raises UserError if a server can't listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except (OSError, OverflowError) as error:
            raise UserError(f"{kind}_host {host}, {kind}_port {port}: {error}") from error


if __name__ == "__main__":
    utils.cli(main)
