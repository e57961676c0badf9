"""deploy/http_server.py and deploy/simple_serving with real servers on free ports."""

import asyncio
import contextlib
import functools
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import REPO, SAMPLE, free_port, needs_package
from predictor import Predictor
from triton_server import PATIENCE, wait_until

import metric
import utils

for package in ("fastapi", "uvicorn", "httptools", "prometheus_client", "swagger_ui_bundle"):
    needs_package(package)
FOLDER = REPO / "deploy" / "simple_serving"
sys.path[:0] = [str(FOLDER), str(REPO / "deploy")]
import batching  # noqa: E402
import loaded_models  # noqa: E402

LABELS = utils.read_labels(SAMPLE / "label.txt")
TEXTS = utils.read_examples(SAMPLE / "dev.txt", LABELS)[0]
TEXTS[20:20] = "", " \u3000"  # are labelled, too, as in a file
LONG = "".join(TEXTS[:10])

# /slow answers once /open was asked, so that no test depends on time.
SMALL_APP = f"""
import asyncio, sys
sys.path.insert(0, {str(REPO)!r})
sys.path.insert(0, {str(REPO / "deploy")!r})
import utils
from http_server import Front, Limits, send_error, send_json

gate = None

async def app(scope, receive, send):
    global gate
    gate = gate or asyncio.Event()
    if scope["type"] != "http":
        raise NotImplementedError
    path, body = scope["path"], (await receive())["body"]
    if path == "/ready":
        return await send_json(send, 503 if scope["front"].stopping else 200, {{}})
    if path == "/fail":
        raise ValueError("a fault")
    if path == "/open":
        gate.set()
    if path == "/slow":
        await gate.wait()
    if path == "/until_gone":
        while not scope["gone"]():
            await asyncio.sleep(0.01)
        scope["access"]["left"] = True
        return
    if path == "/big":
        return await send_json(send, 200, {{"x": "x" * 50_000_000}})
    if path == "/missing":
        return await send_error(send, 404, "nothing here")
    scope["access"]["bytes"] = len(body)
    await send_json(send, 200, {{"path": path, "method": scope["method"], "bytes": len(body)}})

limits = Limits(**{{k: float(v) if "." in v else int(v) for k, v in
                   (pair.split("=") for pair in sys.argv[2:])}})
sys.exit(Front(app, limits, health=["/ready"]).run("127.0.0.1", int(sys.argv[1])))
"""


class Server:
    """A server in a process of its own, with its log; `command` gets the port appended."""

    def __init__(self, command, folder, *flags, ready="/ready"):
        self.port, self.log_file, self.ready_path = free_port(), folder / "log.txt", ready
        command = [str(word).replace("PORT", str(self.port)) for word in (*command, *flags)]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, cwd=folder)

    def log(self):
        return self.log_file.read_text(encoding="utf-8")

    def access(self, wanted=lambda line: True, count=1):
        """The access lines that are wanted, each a dict, once there are so many: a line is written
        after the answer."""

        def found():
            lines = self.log().rpartition("\n")[0].splitlines()
            lines = [json.loads(line) for line in lines if line.startswith("{")]
            lines = [line for line in lines if wanted(line)]
            return lines if len(lines) >= count else None

        return wait_until(found, self.log)

    def wait(self):
        def ready():
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(OSError):
                return self.ask("GET", self.ready_path)[0] == 200

        wait_until(ready, self.log)
        return self

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(self, method, path, body=None, headers=()):
        """(status, body, headers) of one request on its own connection."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers

    def raw(self, *parts, end=False):
        """Everything that comes back for these bytes until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as client:
            for part in parts:
                client.sendall(part)
            if end:
                client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def small(tmp_path):
    """small(limit=...): the front of http_server.py around an app of a few lines."""
    (tmp_path / "app.py").write_text(SMALL_APP, encoding="utf-8")
    with contextlib.ExitStack() as stack:

        def start(**limits):
            flags = [f"{name}={value}" for name, value in limits.items()]
            server = Server([sys.executable, "app.py", "PORT"], tmp_path, *flags)
            return stack.enter_context(server).wait()

        yield start


def statuses(answers):
    """Statuses of the answers that came one after the other on a connection."""
    return [int(status) for status in re.findall(r"HTTP/1\.1 (\d+) ", answers)]


def error_of(answer):
    """The message of the last answer of a connection."""
    error = json.loads(answer.rpartition("\r\n\r\n")[2])
    assert list(error) == ["error"] and "\n" not in error["error"]
    return error["error"]


CLOSE = "Host: a\r\nConnection: close\r\n"


# ------------------------------------------------------------------------------ the shared front
def test_front_request_ids_head_and_access_lines(small):
    server = small()
    status, body, headers = server.ask("POST", "/x?q=secret", "abc", {"X-Request-ID": "my id/1"})
    assert (status, json.loads(body)["bytes"], headers["X-Request-ID"]) == (200, 3, "my id/1")
    for bad in ("x" * 129, "\u00e9", ""):
        new = server.ask("GET", "/x", headers={"X-Request-ID": bad.encode("latin-1")})[2]
        assert re.fullmatch("[0-9a-f]{16}", new["X-Request-ID"])
    status, body, headers = server.ask("HEAD", "/x")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 20
    assert server.ask("GET", "/fail")[0] == 500
    assert server.ask("BREW", "/x")[0] == 400  # not a method of HTTP
    lines = server.access(lambda line: line["path"] != "/ready", 7)
    assert [line["status"] for line in lines] == [200, 200, 200, 200, 200, 500, 400]
    first = {key: lines[0][key] for key in ("request_id", "client", "method", "path", "bytes")}
    assert first == {
        "request_id": "my id/1",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/x",
        "bytes": 3,
    }
    assert "ValueError: a fault" in server.log() and "secret" not in server.log()
    assert server.stop() == 0


CHUNKED = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
REFUSED = {  # name: (bytes, status, what the message says)
    "nonsense": ("NONSENSE\r\n\r\n", 400, "not a valid HTTP request"),
    "two_lengths": (
        "POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        400,
        "Duplicate Content-Length",
    ),
    "length_and_chunked": (
        "POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "Transfer-Encoding",
    ),
    "chunked_and_length": (f"{CHUNKED}Content-Length: 5\r\n\r\n0\r\n\r\n", 400, "Content-Length"),
    "not_chunked": (
        "POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        400,
        "invalid `Transfer-Encoding`",
    ),
    "space": ("POST / HTTP/1.1\r\nContent-Length : 3\r\n\r\nabc", 400, "Invalid header field"),
    "chunk_size": (f"{CHUNKED}\r\nxyz\r\n", 400, "chunk size"),
    "connect": ("CONNECT a:80 HTTP/1.1\r\n\r\n", 400, "not a valid HTTP request"),
    "large": ("POST / HTTP/1.1\r\nContent-Length: 101\r\n\r\n", 413, "more than 100 bytes"),
    "large_chunk": (f"{CHUNKED}\r\n65\r\n" + 101 * "x", 413, "more than 100 bytes"),
    "framing": (f"{CHUNKED}\r\n" + f"1;{4000 * 'y'}\r\nx\r\n" * 90, 413, "too many small chunks"),
    "head": ("GET / HTTP/1.1\r\n" + "a: b\r\n" * 60000, 431, "the head has more than 65536 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_front_refuses(small, name):
    """In JSON, and only after the answer to what was accepted on the same connection."""
    sent, status, reason = REFUSED[name]
    server = small(max_body_bytes=100)
    answers = server.raw(b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n" + sent.encode())
    assert statuses(answers) == [200, status] and "connection: close" in answers
    assert reason in error_of(answers)
    refused = server.access(lambda line: "error" in line)
    assert [(line["status"], line["error"]) for line in refused] == [(status, error_of(answers))]
    assert server.ask("GET", "/after")[0] == 200


def test_front_reads_what_a_refused_client_sends(small):
    """A client that reads only after the whole body gets its 413, not a reset connection."""
    server = small(max_body_bytes=100)
    assert server.ask("POST", "/", b"x" * 8_000_000)[0] == 413


def test_front_body_of_get_and_upgrade_are_no_second_request(small):
    server = small()
    hidden = "GET /hidden HTTP/1.1\r\n\r\n"
    answers = server.raw(
        f"GET /a HTTP/1.1\r\nHost: a\r\nContent-Length: {len(hidden)}\r\n\r\n{hidden}"
        "GET /b HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
        f"GET /c HTTP/1.1\r\n{CLOSE}\r\n".encode()
    )
    assert re.findall(r'"path": "(.*?)"', answers) == ["/a", "/b", "/c"]


def test_front_slow_clients(small):
    server = small(receive_seconds=0.5)
    for slow in (
        "GET / HTTP/1.1\r\nHost: a\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc",
    ):
        answers = server.raw(slow.encode())
        assert statuses(answers) == [408]
        assert error_of(answers) == "the request was not complete within 0.5 s"
    assert server.raw(b"") == ""  # nothing was asked
    # One that does not read its answer is cut off and holds neither a task nor the stop.
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        server.access(lambda line: line["path"] == "/big")
        assert server.stop() == 0


def test_front_connection_limit(small):
    """Further clients are told so; health checks have a place whatever waits there."""
    server = small(max_connections=5, receive_seconds=PATIENCE, patience_seconds=PATIENCE)
    with contextlib.ExitStack() as stack:

        def connect():
            address = ("127.0.0.1", server.port)
            return stack.enter_context(socket.create_connection(address, timeout=PATIENCE))

        slow = [connect() for _ in range(5)]
        for client in slow:
            client.sendall(b"GET /slow HTTP/1.1\r\n")
        wait_until(lambda: server.ask("GET", "/x")[0] == 503, server.log)
        assert server.ask("GET", "/ready")[0] == 200
        others = [connect() for _ in range(100)]  # more than the reserve
        for client in others:
            client.sendall(b"GET /x HT")
        for _ in range(5):
            assert server.ask("GET", "/ready")[0] == 200
        answers = b"".join(iter(lambda: others[0].recv(1 << 16), b"")).decode()
        assert statuses(answers) == [503]
        assert error_of(answers) == "too many connections; retry later"
        slow[0].close()
        wait_until(lambda: server.ask("GET", "/x")[0] == 200, server.log)


def test_front_idle_connections_make_room(small):
    server = small(max_connections=3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(server.connect())) for _ in range(5)]
        for client in clients:
            client.request("GET", "/x")
            assert client.getresponse().read()
        for client in clients[2:]:  # the last three are still open
            socket_before = client.sock
            client.request("GET", "/x")
            assert client.getresponse().status == 200 and client.sock is socket_before
        assert clients[0].sock.recv(1) == clients[1].sock.recv(1) == b""


def test_front_slow_connections_make_room(small):
    """They go before idle ones, and never while their request waits for its answer."""
    server = small(max_connections=4, receive_seconds=PATIENCE, patience_seconds=0.2)
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        idle, busy = (stack.enter_context(contextlib.closing(server.connect())) for _ in range(2))
        idle.request("GET", "/x")
        assert idle.getresponse().read()
        socket_before = idle.sock
        busy.request("GET", "/slow")
        slow = [stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(2)]
        for client in slow:
            client.sendall(b"GET /slow HTTP/1.1\r\nX: ")
        time.sleep(0.3)  # longer is as good
        for client in slow:  # the older one first
            new = stack.enter_context(contextlib.closing(server.connect()))
            new.request("GET", "/x")
            assert new.getresponse().read()
            assert statuses(b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()) == [503]
        idle.request("GET", "/open")
        assert idle.getresponse().status == 200 and idle.sock is socket_before
        assert busy.getresponse().status == 200


def test_front_stops_with_an_answer_for_everyone(small):
    server = small(grace_seconds=4)
    with contextlib.closing(server.connect()) as idle, contextlib.closing(server.connect()) as slow:
        idle.request("GET", "/x")
        assert idle.getresponse().read()
        slow.request("POST", "/slow", "abc")
        slow_answer = {}

        def read():
            answer = slow.getresponse()
            slow_answer.update(status=answer.status, close=answer.headers["Connection"])

        thread = threading.Thread(target=read)
        thread.start()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping: accepted requests are answered" in server.log(), server.log)
        idle.request("GET", "/ready")  # within the grace, on a connection from before
        answer = idle.getresponse()
        assert (answer.status, answer.headers["Connection"]) == (503, "close")
        answer.read()
        assert server.ask("GET", "/open")[2]["Connection"] == "close"  # still taken
        thread.join(PATIENCE)
        assert slow_answer == {"status": 200, "close": "close"}
    assert server.process.wait(PATIENCE) == 0


def test_front_says_what_it_did_not_answer(small):
    server = small(grace_seconds=0.1, drain_seconds=1)
    with contextlib.closing(server.connect()) as slow:
        slow.request("GET", "/slow")
        wait_until(lambda: server.ask("GET", "/x")[0] == 200, server.log)
        server.process.send_signal(signal.SIGTERM)
        answer = slow.getresponse()
        assert answer.status == 503
        assert error_of("\r\n\r\n" + answer.read().decode()) == (
            "the server is stopping; retry later"
        )
    assert server.process.wait(PATIENCE) == 1


def test_front_tells_the_app_when_a_client_leaves(small):
    server = small()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /until_gone HTTP/1.1\r\nHost: a\r\n\r\n")
    assert server.access(lambda line: "left" in line)[0]["status"] == 499


def test_front_address_in_use(small, tmp_path):
    server = small()
    again = subprocess.run(
        [sys.executable, "app.py", str(server.port)], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode != 0
    assert f"cannot listen on 127.0.0.1:{server.port}: Address already in use" in again.stderr


# ------------------------------------------------------------------------------------- batching
def test_batches_are_of_like_length():
    """Padding never costs more than the passes that are saved."""
    like_length = functools.partial(batching.like_length, pass_tokens=8)
    lengths = [3, 4, 4, 5, 60, 61, 120]
    expected = {0: (0, 4), 2: (0, 4), 3: (0, 4), 4: (4, 6), 5: (4, 6), 6: (6, 7)}
    for first, window in expected.items():
        assert like_length(lengths, first, 32) == window
    assert like_length([7] * 9, 4, 3) in [(2, 5), (3, 6), (4, 7)]
    assert like_length([10, 18], 0, 2) == (0, 2)
    assert like_length([10, 19], 0, 2) == (0, 1)


class FakeModel:
    """Waits in forward until it may go on; probability 0.75 of every class for every text."""

    info = SimpleNamespace(labels=["a", "b"], max_seq_length=20)

    def __init__(self, tokenizer):
        self.tokenizer, self.go, self.started, self.shapes = tokenizer, None, threading.Event(), []
        self.go = threading.Event()

    def forward(self, input_ids, token_type_ids):
        self.shapes.append(input_ids.shape)
        self.started.set()
        assert self.go.wait(PATIENCE)
        if input_ids.shape[1] == 13:
            raise RuntimeError("a bad day")
        return np.full((len(input_ids), 2), np.log(3), dtype=np.float32)


@pytest.fixture
def batched(tiny_model):
    """batched(submit): what submit(job, batcher, model) returns, run while a first text blocks the
    only thread; job(letters, **settings) makes a request of one text for each number of letters."""
    model = FakeModel(utils.load_tokenizer(tiny_model))

    def run(scenario, **settings):
        async def main():
            batcher = batching.Batcher(
                **{"batch_size": 4, "max_queue": 9, **settings},
                threads=1,
                device="cpu",
                on_batch=lambda size: None,
            )
            batcher.start()

            def submit(*letters, gone=lambda: False, seconds=PATIENCE):
                job = batching.Job(model, ["\u662f" * n for n in letters], gone, seconds)
                batcher.submit(job)
                return job

            first = submit(1)
            await asyncio.to_thread(model.started.wait, PATIENCE)
            try:
                return await asyncio.wait_for(scenario(submit, model), PATIENCE)
            finally:
                model.go.set()
                await first.done
                batcher.close()

        return asyncio.run(main()), model.shapes

    return run


def test_waiting_requests_are_merged(batched):
    async def scenario(submit, model):
        jobs = [submit(2), submit(18), submit(2, 3), submit(17), submit(2), submit(30)]
        model.go.set()
        return [await job.done for job in jobs]

    answers, shapes = batched(scenario)
    assert [probs.shape for probs, _ in answers] == [(1, 2), (1, 2), (2, 2), (1, 2), (1, 2), (1, 2)]
    assert np.allclose(np.concatenate([probs for probs, _ in answers]), 0.75)
    assert [cut for _, cut in answers] == [[False]] * 2 + [[False, False]] + [[False]] * 2 + [
        [True]
    ]
    assert shapes == [
        (1, 3),
        (4, 5),
        (3, 20),
    ]  # 18 letters are 20 tokens, as many as 30 that are cut


def test_who_left_or_is_late_is_not_run(batched):
    left = threading.Event()

    async def scenario(submit, model):
        gone, late, kept = submit(2, gone=left.is_set), submit(2, 2, seconds=0), submit(2)
        left.set()
        model.go.set()
        with pytest.raises(batching.GoneError):
            await gone.done
        with pytest.raises(batching.LateError):
            await late.done
        return await kept.done

    _, shapes = batched(scenario)
    assert shapes == [(1, 3), (1, 4)]


def test_a_full_queue_refuses_and_a_fault_is_of_its_batch_only(batched, caplog):
    async def scenario(submit, model):
        kept = submit(*[2] * 9)
        with pytest.raises(batching.QueueFullError):
            submit(2)
        model.go.set()
        await kept.done
        large = submit(*[3] * 20)  # alone, it may be larger than the queue
        await large.done
        bad, good = submit(11), submit(1)
        with pytest.raises(RuntimeError, match="a bad day"):
            await bad.done
        return (await good.done)[0]

    probs, _ = batched(scenario)
    assert np.allclose(probs, 0.75)


# ------------------------------------------------------------------------------------ the server
@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(*flags): server.py in a process of its own, ready."""
    with contextlib.ExitStack() as stack:

        def run(*flags, wait=True):
            folder = tmp_path_factory.mktemp("simple")
            command = [sys.executable, FOLDER / "server.py", "--port", "PORT"]
            server = Server(command, folder, *flags, ready="/health/ready")
            stack.enter_context(server)
            return server.wait() if wait else server

        yield run


@pytest.fixture(scope="module")
def server(start, bundle, limited):
    return start("--model_path_prefix", f"plain={bundle}/float32", f"few={limited[1]}/float32")


@pytest.fixture(scope="module")
def expected(bundle):
    """The predictor's own (label names, probabilities) of TEXTS, one text after the other."""
    predictor = Predictor(f"{bundle}/float32", num_threads=1)
    answers = [predictor.predict([text]) for text in TEXTS]
    return [names[0] for names, _ in answers], np.concatenate([probs for _, probs in answers])


def predict(server, body, connection=None):
    """(status, JSON answer) of POST /predict."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    own = connection or server.connect()
    own.request("POST", "/predict", body)
    answer = own.getresponse()
    content = json.loads(answer.read())
    if connection is None:
        own.close()
    return answer.status, content


def names_of(result):
    return [given["label"] for given in result["labels"]]


def metrics(server):
    """{name with labels: value} of /metrics."""
    text = server.ask("GET", "/metrics")[1].decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_labels_and_scores_are_those_of_the_predictor(server, expected):
    """However many texts a request has and whatever else runs at the time."""
    before = metrics(server)
    names, probs = expected
    sizes = [1, 2, 3, 5, 8, 13, 1, 64]
    starts = np.cumsum([0] + sizes * 20)
    jobs = [(a, b) for a, b in zip(starts, starts[1:]) if b <= len(TEXTS)]

    def ask(job):
        start, end = job
        status, answer = predict(server, {"texts": TEXTS[start:end], "all_scores": True})
        assert status == 200 and answer["model"] == "plain"
        return answer["results"]

    with ThreadPoolExecutor(16) as pool:
        results = [result for answer in pool.map(ask, jobs) for result in answer]
    assert len(results) > 300
    assert [names_of(result) for result in results] == names[: len(results)]
    scores = np.array([[result["scores"][label] for label in LABELS] for result in results])
    assert np.abs(scores - probs[: len(results)]).max() < 1e-5
    for result, row in zip(results, scores):
        assert [(g["label"], g["score"]) for g in result["labels"]] == [
            (label, score) for label, score in zip(LABELS, row) if score > 0.5
        ]
    after = metrics(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["seqcls_texts_total"] == grown["seqcls_batch_texts_sum"] == len(results)
    assert grown["seqcls_batch_texts_count"] < 0.7 * len(results)  # merged
    assert grown['seqcls_requests_total{path="/predict",status="200"}'] == len(jobs)
    assert grown["seqcls_request_seconds_count"] == len(jobs)


def test_requests_of_one_text_are_merged(server):
    """16 clients at once; nothing but their own load makes them wait for one another."""

    def merged():
        before = metrics(server)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda text: predict(server, {"text": text}), TEXTS[:200]))
        assert {status for status, _ in answers} == {200}
        after = metrics(server)
        return (
            after["seqcls_batch_texts_count"] - before["seqcls_batch_texts_count"] < 200
            and after["seqcls_queue_texts"] == 0
        )

    wait_until(merged, server.log)


def test_decision_rule_of_the_bundle_and_of_the_request(server, limited, expected):
    _, _, texts, names = limited
    for start in range(0, len(texts), 60):
        status, answer = predict(server, {"model": "few", "texts": texts[start : start + 60]})
        assert (status, answer["model"]) == (200, "few")
        assert [names_of(r) for r in answer["results"]] == names[start : start + 60]
    probs = expected[1][:50]
    by_label = np.full(len(LABELS), 0.5, dtype=np.float32)
    by_label[[0, 3]] = 0.01, 1
    for more, rule in (
        ({"thresholds": 0.05}, {"thresholds": 0.05}),
        ({"thresholds": {LABELS[0]: 0.01, LABELS[3]: 1}}, {"thresholds": by_label}),
        ({"min_labels": 2}, {"min_labels": 2}),
        ({"max_labels": 0}, {"max_labels": 0}),
        (
            {"thresholds": 0, "min_labels": 1, "max_labels": 3},
            {"thresholds": 0, "min_labels": 1, "max_labels": 3},
        ),
    ):
        status, answer = predict(server, {"texts": TEXTS[:50], **more})
        wanted = metric.label_names(metric.decode(probs, **rule), LABELS)
        assert status == 200 and [names_of(r) for r in answer["results"]] == wanted
        assert "scores" not in answer["results"][0]


def test_long_texts_are_cut_and_said_to_be(server, bundle):
    predictor = Predictor(f"{bundle}/float32", num_threads=1)
    room = predictor.info.max_seq_length - 2
    word = "\u662f"  # one token each
    texts = [word * room, word * (room + 1), LONG, TEXTS[0]]
    status, answer = predict(server, {"texts": texts, "all_scores": True})
    assert status == 200
    assert [result["cut"] for result in answer["results"]] == [False, True, True, False]
    scores = [[result["scores"][label] for label in LABELS] for result in answer["results"]]
    assert np.abs(np.array(scores) - predictor.predict(texts)[1]).max() < 1e-5
    line = server.access(lambda line: line.get("texts") == 4)[0]
    assert (line["model"], line["status"], line["cut"]) == ("plain", 200, 2)


DEEP = b'{"texts": ' + b"[" * 400_000 + b"]" * 400_000 + b"}"
INVALID = {  # name: (body, status, the whole message or its beginning)
    "empty_body": (b"", 400, "the body is not JSON in UTF-8: Expecting value"),
    "not_json": (b"texts=a", 400, "the body is not JSON in UTF-8: Expecting value"),
    "not_utf8": (b'{"text": "\xff"}', 400, "the body is not JSON in UTF-8: 'utf-8' codec"),
    "utf16": ('{"text": "a"}'.encode("utf-16"), 400, "the body is not JSON in UTF-8"),
    "nan": (b'{"text": "a", "thresholds": NaN}', 400, "the body is not JSON in UTF-8: NaN is no"),
    "infinity": (
        b'{"text": "a", "thresholds": -Infinity}',
        400,
        "the body is not JSON in UTF-8: -I",
    ),
    "overflow": (b'{"text": "a", "thresholds": 1e999}', 422, "thresholds must be a number from 0"),
    "long_number": (
        b'{"min_labels": ' + b"9" * 5000 + b"}",
        400,
        "the body is not JSON in UTF-8: E",
    ),
    "huge_number": (
        b'{"text": "a", "thresholds": ' + b"9" * 400 + b"}",
        422,
        "thresholds must be a number from 0",
    ),
    "deep": (DEEP, 400, "the body is not JSON in UTF-8: nested too deeply"),
    "null": (b"null", 422, 'send a JSON object such as {"texts": ["..."]}'),
    "list": (b'["a"]', 422, "send a JSON object such as"),
    "nothing": (b"{}", 422, "send either texts, a list of strings, or text, a string"),
    "both": (b'{"texts": ["a"], "text": "a"}', 422, "send either texts"),
    "unknown_key": (
        b'{"text": "a", "treshold": 1}',
        422,
        'unknown key "treshold"; known: texts, text, model, all_scores, thresholds, min_labels',
    ),
    "surrogate_key": (b'{"text": "a", "\\ud800": 1}', 422, 'unknown key "\\ud800"; known: texts'),
    "texts_null": (b'{"texts": null}', 422, "texts must be a list of strings"),
    "texts_string": (b'{"texts": "abc"}', 422, "texts must be a list of strings"),
    "no_texts": (b'{"texts": []}', 422, "texts is empty; send at least one text"),
    "text_null": (b'{"text": null}', 422, "text 0 is not a string"),
    "text_number": (b'{"texts": ["a", 5]}', 422, "text 1 is not a string"),
    "surrogate": (b'{"text": "a\\ud83d"}', 422, "text 0: invalid Unicode (lone surrogate)"),
    "long_text": (
        b'{"texts": ["a", "%s"]}' % (b"a" * 32769),
        422,
        "text 1 has 32769 bytes; at most 32768",
    ),
    "many_texts": (
        json.dumps({"texts": ["a"] * 65}).encode(),
        422,
        "65 texts; send at most 64 in one request",
    ),
    "model": (b'{"text": "a", "model": "x"}', 422, 'unknown model "x"; this server has plain, few'),
    "model_list": (b'{"text": "a", "model": []}', 422, "unknown model list; this server has plain"),
    "all_scores": (b'{"text": "a", "all_scores": 1}', 422, "all_scores must be true or false"),
    "threshold": (b'{"text": "a", "thresholds": 1.5}', 422, "thresholds must be a number from 0"),
    "threshold_bool": (b'{"text": "a", "thresholds": true}', 422, "thresholds must be a number"),
    "threshold_null": (b'{"text": "a", "thresholds": null}', 422, "thresholds must be a number"),
    "threshold_list": (b'{"text": "a", "thresholds": [0.5]}', 422, "thresholds must be a number"),
    "threshold_label": (
        b'{"text": "a", "thresholds": {"x": 0.5}}',
        422,
        'thresholds: unknown label "x"; GET /info lists them',
    ),
    "min_labels": (b'{"text": "a", "min_labels": 21}', 422, "min_labels must be a whole number fr"),
    "min_labels_float": (b'{"text": "a", "min_labels": 1.0}', 422, "min_labels must be a whole"),
    "min_above_max": (
        b'{"text": "a", "min_labels": 3, "max_labels": 2}',
        422,
        "min_labels 3, max_labels 2: the model has 20 labels; give 0 <= min_labels <= max_labels",
    ),
    "large": (b" " * (1 << 20) + b"{}", 413, "the body has more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_requests(server, name):
    body, status, message = INVALID[name]
    got, answer = predict(server, body)
    assert got == status and list(answer) == ["error"], answer
    assert answer["error"].startswith(message) and "\n" not in answer["error"]
    assert len(answer["error"]) < 300
    assert predict(server, {"text": TEXTS[0]})[0] == 200


def test_paths_and_methods(server):
    for path in ("/info", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/docs"):
        status, body, headers = server.ask("GET", path)
        assert status == 200 and body
        status, body, head = server.ask("HEAD", path)
        assert (status, body) == (200, b"") and head["Content-Type"] == headers["Content-Type"]
        status, body, headers = server.ask("POST", path, b"{}")
        assert status == 405 and "GET" in headers["Allow"]
        assert json.loads(body) == {"error": "POST is not allowed here"}
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        status, body, headers = server.ask(method, "/predict")
        assert status == 405 and headers["Allow"] == "POST"
        assert json.loads(body) == {"error": f"{method} is not allowed here"}
    assert server.ask("HEAD", "/predict")[0] == 405
    for path in ("/nothing", "/predict/", "//predict", "/docs/../server.py", "/%2e%2e/server.py"):
        status, body, _ = server.ask("GET", path)
        assert (status, json.loads(body)) == (404, {"error": "no such path; see /docs"})
    status, body, headers = server.ask("GET", "/")
    if (FOLDER / "index.html").exists():
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    else:
        assert status == 404


def test_examples_of_the_readme(server):
    """As they are pasted, but for the port."""
    url = f"http://127.0.0.1:{server.port}"
    for page in ("README.md", "README_en.md"):
        text = (FOLDER / page).read_text("utf-8").replace("http://127.0.0.1:8000", url)
        curl = re.search(r"^curl .*", text, re.M)[0]
        answer = json.loads(subprocess.run(shlex.split(curl), capture_output=True).stdout)
        shown = json.loads(re.search(r'^\{"model": .*', text, re.M)[0])
        assert [[*result] for result in answer["results"]] == [["labels", "cut"]] * 2
        assert [names_of(r) for r in answer["results"]] == [names_of(r) for r in shown["results"]]
        code = re.search(r"```python\n(.*?)```", text, re.S)[1]
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0 and "'label': '婚后有子女'" in run.stdout, run.stderr


def test_info(server, bundle):
    info = json.loads(server.ask("GET", "/info")[1])
    sha256 = utils.read_model_info(bundle).model_sha256
    plain, few = info["models"]
    assert plain == {
        "name": "plain",
        "model_sha256": sha256,
        "labels": LABELS,
        "thresholds": [0.5] * 20,
        "max_seq_length": 128,
        "min_labels": 0,
        "max_labels": None,
        "precision": "fp32",
    }
    assert (few["name"], few["min_labels"], few["max_labels"]) == ("few", 1, 2)
    assert len(few["thresholds"]) == 20 and few["thresholds"] != [0.5] * 20
    assert info["limits"] == {
        "max_texts": 64,
        "max_text_bytes": 32768,
        "max_body_bytes": 1 << 20,
        "max_queue": 1024,
        "batch_size": 32,
    }
    assert {"python", "tokenizers", "numpy"} < set(info["versions"])
    assert predict(server, {"text": "a"})[1]["model_sha256"] == sha256


def test_docs_need_no_network(server):
    page = server.ask("GET", "/docs")[1].decode()
    assert re.findall(r"https?:|//[a-z]", page.replace("// `Swagger", "")) == []
    files = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(files) == 3
    for file in files:
        assert server.ask("GET", f"/{file}")[0] == 200
    described = json.loads(server.ask("GET", "/openapi.json")[1])
    assert described["openapi"].startswith("3.0.")  # what the bundled page can read
    assert set(described["paths"]) == {
        "/predict",
        "/info",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    content = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    known = INVALID["unknown_key"][2].partition("known: ")[2].split(", ")
    assert list(content["application/json"]["schema"]["properties"])[:6] == known[:6]
    example = content["application/json"]["schema"]["example"]
    assert predict(server, example)[0] == 200


def test_access_lines_hold_no_text(server):
    secret = "\u79c1\u5bc6"
    body = json.dumps({"text": secret, "model": secret}).encode()
    status, _, headers = server.ask("POST", "/predict?text=abcsecret", body)
    assert status == 422
    status, _, headers = server.ask(
        "POST", "/predict", json.dumps({"text": secret}), {"X-Request-ID": "from-the-proxy"}
    )
    assert (status, headers["X-Request-ID"]) == (200, "from-the-proxy")
    line = server.access(lambda line: line["request_id"] == "from-the-proxy")[0]
    assert line.pop("ms") > 0 and line.pop("time").endswith("+00:00")
    assert line == {
        "request_id": "from-the-proxy",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "model": "plain",
        "texts": 1,
        "cut": 0,
    }
    log = server.log()
    assert secret not in log and "\\u79c1" not in log and "abcsecret" not in log


def test_limits_of_the_command_line(start, bundle):
    server = start(
        *("--model_path_prefix", f"{bundle}/float32", "--wait_seconds", "0", "--max_texts", "2"),
        *("--max_text_bytes", "9", "--max_body_bytes", "200", "--receive_seconds", "0.5"),
        "--no_access_log",
    )
    assert predict(server, {"texts": ["a"] * 3})[1]["error"].startswith("3 texts; send at most 2")
    assert predict(server, {"text": "a" * 10})[1]["error"] == "text 0 has 10 bytes; at most 9"
    assert predict(server, {"text": "a" * 200})[0] == 413
    assert predict(server, {"text": "a"}) == (
        503,
        {"error": "no answer within 0 s: too many texts wait; retry later"},
    )
    answers = server.raw(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
    assert statuses(answers) == [408]
    assert json.loads(server.ask("GET", "/info")[1])["models"][0]["name"] == bundle.name
    assert server.stop() == 0
    assert "listening on" in server.log() and "/predict" not in server.log()


def test_a_full_queue_answers_429(start, bundle):
    prefix = f"{bundle}/float32"
    server = start("--model_path_prefix", prefix, "--max_queue", "64", "--num_passes", "1")
    body = json.dumps({"texts": [LONG] * 64}).encode()

    def ask(_):
        return server.ask("POST", "/predict", body)

    def refused():
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(24)))
        assert {status for status, _, _ in answers} <= {200, 429}
        return [answer for answer in answers if answer[0] == 429]

    _, content, headers = wait_until(refused, server.log)[0]
    assert json.loads(content) == {"error": "the queue is full; retry later"}
    assert headers["Retry-After"] == "1"
    assert predict(server, {"text": TEXTS[0]})[0] == 200
    assert metrics(server)['seqcls_requests_total{path="/predict",status="429"}'] > 0


def test_slow_connections_lock_nobody_out(start, bundle):
    """Also not if there are more than --max_connections."""
    flags = "--receive_seconds", "600", "--max_connections", "256"
    server = start("--model_path_prefix", f"{bundle}/float32", *flags)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            address = ("127.0.0.1", server.port)
            client = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Le")
        seconds = []
        for _ in range(5):
            before = time.perf_counter()
            assert server.ask("GET", "/health/ready")[0] == 200
            seconds.append(time.perf_counter() - before)
        assert min(seconds) < 1
        wait_until(lambda: predict(server, {"text": TEXTS[0]})[0] == 200, server.log)


class Load:
    """Clients with keep-alive connections that ask one text after the other until told to stop."""

    def __init__(self, server, clients=8):
        self.server, self.stopped, self.answers, self.lost = server, False, [], []
        self.threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def ask(self, start):
        number, connection = start, None
        while not self.stopped:
            if connection is None:
                connection, answered = self.server.connect(), False
            number = (number + 7) % len(TEXTS)
            try:
                connection.request("POST", "/predict", json.dumps({"text": TEXTS[number]}))
                answer = connection.getresponse()
                content = json.loads(answer.read())
            except (OSError, http.client.HTTPException) as error:
                if not answered:  # no server listens any more
                    return
                self.lost.append(repr(error))
                connection = None
                continue
            self.answers.append((number, answer.status, content))
            answered = True
            if answer.headers["Connection"] == "close":
                connection = None

    def join(self):
        self.stopped = True
        for thread in self.threads:
            thread.join(PATIENCE)


def test_sigterm_under_load_answers_all(start, bundle, expected):
    flags = ["--model_path_prefix", f"{bundle}/float32", "--grace_seconds", "3"]
    server = start(*flags)
    load = Load(server)
    wait_until(lambda: len(load.answers) > 50, server.log)
    assert server.stop() == 0
    load.join()
    assert load.lost == []
    assert {status for _, status, _ in load.answers} == {200}
    for number, _, content in load.answers:
        assert names_of(content["results"][0]) == expected[0][number]
    lines = server.access(lambda line: line["path"] == "/predict", len(load.answers))
    assert {line["status"] for line in lines} == {200} and len(lines) == len(load.answers)


def change(bundle, folder):
    """A bundle with another SHA-256 and thresholds of 1, so that no text gets a label."""
    new = shutil.copytree(bundle, folder)
    config = utils.read_json(new / "config.json")
    config |= {"model_sha256": "1" * 64, "thresholds": [1.0] * len(LABELS)}
    (new / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = onnx.load(str(new / "model.onnx"))
    next(p for p in model.metadata_props if p.key == "model_sha256").value = "1" * 64
    onnx.save(model, str(new / "model.onnx"))
    return new


def served(server):
    return json.loads(server.ask("GET", "/info")[1])["models"][0]["model_sha256"]


def test_a_replaced_bundle_is_taken_without_losing_a_request(start, bundle, expected, tmp_path):
    """As a symbolic link that is moved, while clients ask."""
    link, other = tmp_path / "link", change(bundle, tmp_path / "new")
    link.symlink_to(bundle)
    server = start("--model_path_prefix", f"m={link}/float32")
    old = served(server)
    load = Load(server, 4)
    wait_until(lambda: len(load.answers) > 20, server.log)
    (tmp_path / "next").symlink_to(other)
    os.replace(tmp_path / "next", link)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: served(server) == "1" * 64, server.log)
    count = len(load.answers)
    wait_until(lambda: len(load.answers) > count + 20, server.log)
    load.join()
    assert load.lost == [] and {status for _, status, _ in load.answers} == {200}
    assert {content["model_sha256"] for _, _, content in load.answers} == {old, "1" * 64}
    for number, _, content in load.answers:
        wanted = expected[0][number] if content["model_sha256"] == old else []
        assert names_of(content["results"][0]) == wanted
    assert f"model m: SHA-256 {'1' * 64} (was {old})" in server.log()
    assert metrics(server)['seqcls_reloads_total{result="taken"}'] == 1
    assert server.stop() == 0


def test_a_broken_bundle_keeps_the_old_one(start, bundle, tmp_path):
    """One line says so each time; --reload_seconds finds the mended one by itself."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    server = start("--model_path_prefix", f"m={folder}/float32", "--reload_seconds", "0.2")
    old, good = served(server), (folder / "model.onnx").read_bytes()

    def errors():
        return re.findall(r"ERROR\] - (.*)", server.log())

    (folder / "model.onnx").write_bytes(good[: len(good) // 2])
    wait_until(errors, server.log)
    prefix = "model m: not replaced, the old one stays: "
    assert errors()[0].startswith(prefix + f"{folder}/model.onnx: not a readable ONNX model")
    assert predict(server, {"text": TEXTS[0]})[1]["model_sha256"] == old
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(errors()) == 2, server.log)
    (folder / "config.json").write_text("{", encoding="utf-8")
    wait_until(lambda: len(errors()) == 3, server.log)
    assert errors()[2].startswith(prefix + f"{folder}/config.json: not valid JSON")
    assert metrics(server)['seqcls_reloads_total{result="failed"}'] == 3
    shutil.rmtree(folder)
    change(bundle, tmp_path / "new")
    os.replace(tmp_path / "new", folder)
    wait_until(lambda: served(server) == "1" * 64, server.log)
    assert len(errors()) == 3 and server.stop() == 0


def test_int8(start, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    server = start("--model_path_prefix", f"{folder}/float32", "--use_quantize")
    assert json.loads(server.ask("GET", "/info")[1])["models"][0]["precision"] == "int8"
    predictor = Predictor(f"{folder}/float32", precision="int8", num_threads=1)
    for text in TEXTS[:5]:
        _, answer = predict(server, {"text": text, "all_scores": True})
        names, probs = predictor.predict([text])
        scores = answer["results"][0]["scores"]
        assert np.abs(np.array([scores[label] for label in LABELS]) - probs[0]).max() < 1e-5
        assert names_of(answer["results"][0]) == names[0]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--model_path_prefix", "nowhere/float32"], "nowhere: no such folder"),
        (["--model_path_prefix", "BUNDLE"], "is a folder; give the prefix of its files"),
        (
            ["--model_path_prefix", "a=BUNDLE/float32", "a=BUNDLE/float32"],
            "two models are called a",
        ),
        (
            ["--model_path_prefix", "a b=BUNDLE/float32"],
            "name the model, as in NAME=BUNDLE/float32",
        ),
        (["--model_path_prefix", "BUNDLE/float32", "--use_fp16"], "--use_fp16 needs --device gpu"),
        (
            ["--model_path_prefix", "BUNDLE/float32", "--port", "70000"],
            "cannot listen on 127.0.0.1",
        ),
        (["--model_path_prefix", "BUNDLE/float32", "--host", "::9"], "cannot listen on ::9:"),
        (
            ["--model_path_prefix", "BUNDLE/float32", "--max_labels", "21"],
            "the model has 20 labels",
        ),
    ],
)
def test_mistakes_at_the_start(bundle, flags, message, tmp_path):
    command = [sys.executable, FOLDER / "server.py", "--port", str(free_port())]
    command += [flag.replace("BUNDLE", str(bundle)) for flag in flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message.replace("BUNDLE", str(bundle)) in errors[0], run.stderr


def test_no_paddle():
    code = "import sys, server; sys.exit(any(m.startswith('paddle') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0


def test_models_are_called_after_their_folders():
    given = ["some/export/float32", "second=other/float32", "c:=x=y/float32"]
    assert loaded_models.parse_models(given[:2]) == {
        "export": "some/export/float32",
        "second": "other/float32",
    }
    with pytest.raises(utils.UserError, match="name the model, as in NAME=y/float32"):
        loaded_models.parse_models(given[2:])


def test_the_readme_installs_what_requirements_lists():
    """Beside Paddle's pins: all but the predictor's own requirements."""
    text = (FOLDER / "requirements.txt").read_text(encoding="utf-8")
    lines = [re.split(r"[ ;#]", line)[0] for line in text.splitlines()]
    listed = {re.sub(">=.*", "", line) for line in lines if re.match(r"\w", line)}
    for page in ("README.md", "README_en.md"):
        command = re.search(r"pip install (fastapi .*)", (FOLDER / page).read_text("utf-8"))[1]
        assert set(command.split()) == listed
