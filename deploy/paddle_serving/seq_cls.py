"""Paddle Serving's pipeline for a bundle: request - seq_cls - response. Used by service.py.

Requests that wait are merged, and what was merged is run in batches of like length.
"""

import contextlib
import copy
import json
import logging
import os
import queue
import sys
import threading
import types
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "predictor"))
import utils
from utils import UserError, logger

NAME = "seq_cls"  # of the service
PREFIX = "float32"
BAD_REQUEST, BUSY, NOT_READY, FAILED = 51, 52, 53, 54  # err_no; 51 to 99 are the application's
LENGTH_STEP = 16  # tokens; texts of one step are of like length
SIZES = (32,)  # at most so many texts in a batch
ONEDNN_SIZES = 4, 1  # see few_shapes


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
    utils.check_texts(texts, limits["max_texts"], limits["max_text_bytes"])
    return texts


# --------------------------------------------------------------------------------------- forward
def by_length(forward, step=LENGTH_STEP, sizes=SIZES, longest=None):
    """A forward (see utils.run_batches) that calls `forward` for texts of like length only.

    step: tokens by which they may differ. sizes: of the batches; the last is the smallest. longest:
    positions of the model; if given, lengths are filled up to a multiple of `step` with [PAD] = 0,
    which the model masks, and sizes are kept to.
    """

    def run(input_ids, token_type_ids):
        width = input_ids.shape[1]
        lengths = width - (input_ids[:, ::-1] != 0).argmax(axis=1)  # the last token is [SEP]
        steps, parts, logits = -(-lengths // step), [], []
        for number in np.unique(steps):
            rows = np.flatnonzero(steps == number)
            while len(rows):
                size = next((size for size in sizes if size <= len(rows)), len(rows))
                part, rows = rows[:size], rows[size:]
                length = lengths[part].max()
                ids = input_ids[part, :length]
                if longest:
                    length = min(number * step, longest)
                    ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
                parts.append(part)
                logits.append(forward(input_ids=ids, token_type_ids=np.zeros_like(ids)))
        return np.concatenate(logits)[np.argsort(np.concatenate(parts))]

    return run


def few_shapes(capacity, info):
    """Arguments of by_length for oneDNN, which compiles for each shape and keeps a copy of the
    model's weights with it: no more shapes than its cache may hold (0: any number)."""
    lengths = max(1, capacity // len(ONEDNN_SIZES)) if capacity else info.max_seq_length
    step = LENGTH_STEP * -(-info.max_seq_length // (lengths * LENGTH_STEP))
    return {"step": step, "sizes": ONEDNN_SIZES, "longest": info.max_position}


def paddle_forward(client, concurrency):
    """Forward of a LocalPredictor that `concurrency` threads may call at once.

    Threads that share one get each other's results, so each takes a clone with the same weights.
    """
    idle = queue.SimpleQueue()
    idle.put(client)
    for _ in range(concurrency - 1):
        clone = copy.copy(client)
        clone.predictor = client.predictor.clone()
        idle.put(clone)
    (fetch,) = client.fetch_names_

    def forward(**batch):
        one = idle.get()
        try:
            return one.predict(feed=batch, fetch=[fetch], batch=True)[fetch]
        finally:
            idle.put(one)

    return forward


def onnx_session(folder, settings):
    """The session of model.onnx, which deploy/predictor uses, too."""
    try:
        import predictor
    except ImportError as error:
        raise UserError(f"engine: onnxruntime: {error}; pip install onnxruntime") from error
    device, number = ("gpu", int(settings["devices"])) if settings["device_type"] else ("cpu", 0)
    predictor.check_device(device)
    threads = settings["thread_num"]
    return predictor.open_session(folder / PREFIX, "fp32", device, number, threads)


# -------------------------------------------------------------------------------------- pipeline
def import_pipeline(log_dir):
    """Paddle Serving's pipeline package, with its logs in log_dir/PipelineServingLogs."""
    os.environ["SERVING_LOG_PATH"] = str(log_dir)
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
    """Paddle Serving's servicer, with the model loaded. Raises UserError."""
    limits, op_config = config["limits"], config["op"][NAME]
    settings, concurrency = op_config["local_service_conf"], op_config["concurrency"]
    folder, use_onnx = Path(settings["model_config"]), op_config["engine"] == "onnxruntime"
    if not (folder / "serving_server_conf.prototxt").exists():
        raise UserError(f"{folder}: no model for Paddle Serving; run convert.py first")
    utils.static_graph_sha256(folder / PREFIX)
    info, tokenizer = utils.read_model_info(folder), utils.load_tokenizer(folder)
    pipeline = import_pipeline(config["log_dir"])
    from paddle_serving_server.pipeline.channel import ChannelTimeoutError
    from paddle_serving_server.pipeline.pipeline_server import PipelineServer, PipelineServicer
    from paddle_serving_server.pipeline.proto import pipeline_service_pb2

    if settings["device_type"] == 1 and not use_onnx:
        import paddle

        if not paddle.is_compiled_with_cuda():  # it would use CPUs
            raise UserError("device_type 1: this PaddlePaddle has no GPU support")

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
        """`concurrency` threads; each takes the requests that wait, as one batch."""

        labeller = None

        def start_with_thread(self):
            self.threads = super().start_with_thread()
            return self.threads

        def init_client(self, *_):
            return self.local_predictor  # or what stands in for it

        def init_op(self):
            shapes = {}
            if use_onnx:
                import predictor

                forward = predictor.onnx_forward(self.client)
            else:
                forward = paddle_forward(self.client, concurrency)
                if settings["use_mkldnn"] and settings["device_type"] == 0:
                    shapes = few_shapes(settings["mkldnn_cache_capacity"], info)
            forward = by_length(forward, **shapes)
            # One batch, whatever was merged: by_length makes smaller ones of it.
            most = limits["max_texts"] + self._batch_size
            self.labeller = utils.Labeller(forward, tokenizer, info, most)

        def _auto_batching_generator(self, input_channel, op_name, batch_size, **_):
            """The library's own waits for more requests, and does not count their texts."""
            while True:
                batch = [input_channel.front(op_name)]
                share = -(-(1 + input_channel.qsize()) // concurrency)  # the rest is for the others
                with contextlib.suppress(ChannelTimeoutError):
                    while len(batch) < share and sum(map(self.num_texts, batch)) < batch_size:
                        batch.append(input_channel.front(op_name, 1e-9))  # 0 would wait
                yield batch

        @staticmethod
        def num_texts(inputs):
            (data,) = inputs.values()
            return len((data.dictdata or {}).get("texts", ()))

        def preprocess(self, input_dicts, data_id=0, log_id=0):
            (request,) = input_dicts.values()
            # The library joins the arrays of several requests, and slices what process() returns.
            return {"texts": np.array(request["texts"], dtype=object)}, False, None, ""

        def process(self, feed_batch, typical_logid=0):
            texts = feed_batch[0]["texts"].tolist()
            answers = self.answers(texts)
            if len(texts) > 1 and any(isinstance(answer, str) for answer in answers):
                # One text must not fail the others.
                answers = [answer for text in texts for answer in self.answers([text])]
            return {"answers": answers}, 0, ""

        def answers(self, texts):
            """(label names, scores) of each text, or why there are none."""
            try:
                decisions, probs = self.labeller.decide(texts)
            except Exception as error:
                return [f"{type(error).__name__}: {error}"] * len(texts)
            scores = [
                [round(p, 6) for p in row[given].tolist()] for row, given in zip(probs, decisions)
            ]
            return list(zip(self.labeller.names(decisions), scores))

        def postprocess(self, input_data, fetch_data, data_id=0, log_id=0):
            answers = fetch_data["answers"]
            if failed := [answer for answer in answers if isinstance(answer, str)]:
                return {}, FAILED, failed[0]
            reply = zip(("label", "score"), zip(*answers))
            return {k: json.dumps(v, ensure_ascii=False) for k, v in reply}, None, ""

    class Servicer(PipelineServicer):
        """inference() is called by gRPC and by HTTP, each in a thread of its own."""

        Request = pipeline_service_pb2.Request
        slots = threading.BoundedSemaphore(limits["max_requests"])

        def alive(self):
            return all(t.is_alive() for t in [*op.threads, self._dag_executor._recive_func])

        def ready(self):
            return op.labeller is not None and self.alive()

        def inference(self, request, context, request_id=None):
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
                answer = super().inference(request, context)
            finally:
                self.slots.release()
            if answer.err_no in (0, BAD_REQUEST):
                return answer
            who = request_id or f"with log id {request.logid}"
            reason = " ".join(answer.err_msg.split())[:300]
            logger.error("request %s failed (error %d): %s", who, answer.err_no, reason)
            return error(FAILED, "the prediction failed; the server's log has the reason")

    op = SeqCls(name=NAME, input_ops=[Request()])
    server = PipelineServer(NAME)
    server.set_response_op(pipeline.ResponseOp(input_ops=[op]))
    try:
        server.prepare_server(yml_dict={k: v for k, v in config.items() if k != "http_port"})
    except (SystemExit, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"config: {error}") from error
    if use_onnx:  # in place of the handler that loads a LocalPredictor
        session = onnx_session(folder, settings)
        op._local_service_handler = types.SimpleNamespace(get_client=lambda _: session)
    return Servicer(NAME, server._response_op, config)
