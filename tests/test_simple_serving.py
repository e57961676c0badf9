"""deploy/http_server.py and deploy/simple_serving with real servers on free ports."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from conftest import REPO, free_port, needs_package
from triton_server import PATIENCE, wait_until

for package in ("fastapi", "uvicorn", "httptools", "prometheus_client", "swagger_ui_bundle"):
    needs_package(package)

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

    def access(self):
        """The access lines, each a dict."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

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
    lines = [line for line in server.access() if line["path"] != "/ready"]
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
    refused = [line for line in server.access() if "error" in line]
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
        wait_until(lambda: any(line["path"] == "/big" for line in server.access()), server.log)
        assert server.stop() == 0


def test_front_connection_limit(small):
    """Further clients are told so; health checks have a place whatever waits there."""
    server = small(max_connections=5, receive_seconds=PATIENCE)
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


def test_front_stops_with_an_answer_for_everyone(small):
    server = small(grace_seconds=1)
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


def test_front_address_in_use(small, tmp_path):
    server = small()
    again = subprocess.run(
        [sys.executable, "app.py", str(server.port)], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode != 0
    assert f"cannot listen on 127.0.0.1:{server.port}: Address already in use" in again.stderr
