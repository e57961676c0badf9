"""Broken, hostile and slow HTTP clients at every server of deploy/, good ones beside them.

    python benchmarks/serving_hostile.py --model_path_prefix export/float32 --data_file texts.txt

The servers are started here, Triton behind nginx with its nginx.conf. Each gets the requests below
and random changes of a good one; meanwhile good clients compare every answer with the predictor's.
Then --slow connections send a byte every 5 s, half of them in the head and half in the body, and
the readiness check is timed. Exit status 1 if a process has died, an answer was wrong or missing,
or readiness took longer than a second.
"""

import contextlib
import gzip
import itertools
import json
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import servers
from predictor import Predictor

import utils

TEXTS = ["婚后生育一子。", "准予离婚。"]
COLUMNS = "server requests 2xx 4xx 5xx none deaths good_requests wrong failed slow ready_s"
GOOD = {  # path and body of a good request
    "simple_serving": ("/predict", {"texts": TEXTS}),
    "triton": (
        "/v2/models/seqcls/infer",
        {"inputs": [{"name": "INPUT", "shape": [2, 1], "datatype": "BYTES", "data": TEXTS}]},
    ),
    "paddle_serving": (
        "/seq_cls/prediction",
        {"key": ["sentence"], "value": [json.dumps(TEXTS, ensure_ascii=False)]},
    ),
}
CLIENTS = {
    "simple_serving": servers.simple_serving,
    "triton": servers.triton_proxy,
    "paddle_serving": servers.paddle_serving_http,
}
ATTACKERS = 8  # at the same time
SOURCE = "127.0.0.2", 0  # as if from another machine: nginx.conf limits the connections of each
HURRY = 2.0  # seconds that an attacker waits for an answer
SLOW_SECONDS, SLOW_STEP, READY_LIMIT = 20, 5, 1.0


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--model_path_prefix", required=True, help="static graph of a bundle, e.g. export/float32")
    add("--data_file", required=True, help="texts of the good clients, one per line")
    add("--servers", nargs="+", choices=GOOD, default=list(GOOD), help="which are attacked")
    add("--requests", type=utils.at_least(1), default=1000, help="hostile requests to each")
    add("--slow", type=utils.at_least(0), default=300, help="slow connections")
    add("--seed", type=int, default=3, help="of the random changes")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    predictor = Predictor(args.model_path_prefix)
    texts = list(utils.read_texts(args.data_file))[:500]
    good = texts, list(zip(*predictor.predict(texts))), predictor.info
    rows = []
    for kind in args.servers:
        with tempfile.TemporaryDirectory() as folder:
            prefix = args.model_path_prefix
            with servers.Running(kind, prefix, Path(folder) / kind, kind == "triton") as server:
                rows.append(Attack(server, good).run(args))
    print(f"| {' | '.join(COLUMNS.split())} |", "|---" * len(COLUMNS.split()) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in COLUMNS.split())} |")
    if any(row["deaths"] or row["wrong"] or row["failed"] for row in rows) or any(
        row["ready_s"] > READY_LIMIT for row in rows
    ):
        sys.exit(1)


# -------------------------------------------------------------------------------------- requests
def head(path, *lines, method="POST"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def request(path, body, *lines, method="POST"):
    if not isinstance(body, bytes):
        body = json.dumps(body, ensure_ascii=False).encode()
    return head(path, f"Content-Length: {len(body)}", *lines, method=method) + body


def hostile(kind):
    """Whole requests, or what there is of them, as bytes."""
    path, value = GOOD[kind]
    good = json.dumps(value, ensure_ascii=False).encode()
    length = f"Content-Length: {len(good)}"
    chunked = "Transfer-Encoding: chunked"
    yield b""
    yield b"\r\n" * 5000
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)  # TLS
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"GET /\r\n\r\n"
    yield b"GET / HTTP/9.9\r\n\r\n"
    yield b"\xff\xfe / HTTP/1.1\r\nHost: x\r\n\r\n"
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "NOPE"):
        yield request(path, good, method=method)
        yield head("/", method=method)
    for wrong in ("/../../etc/passwd", "/%2e%2e/%00", "/" + "a" * 100_000, "//", "*", "/docs/../x"):
        yield head(wrong, method="GET")
    yield head(path, "X: " + "a" * 200_000)
    yield head(path, *(f"X{i}: {i}" for i in range(5000)))
    yield head(path, "Bad Header") + good
    yield head(path, "X: a\0b", length) + good
    yield head(path, length, f"Content-Length: {len(good) + 5}") + good + b"GET / "
    yield head(path, "Content-Length: -1") + good
    yield head(path, "Content-Length: 99999999999999999999") + good
    yield head(path, "Content-Length: 1e3") + good
    yield head(path, length, chunked) + b"0\r\n\r\n" + head("/", method="GET")
    yield head(path, chunked, "Transfer-Encoding: identity") + b"0\r\n\r\n"
    yield head(path, chunked) + b"zz\r\n" + good
    yield head(path, chunked) + b"ffffffffffffffff\r\n" + good
    yield head(path, chunked) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good)
    yield head(path, chunked) + b"1\r\n{\r\n" * 1_000_000
    yield head(path, length) + good[:10]
    yield head(path, length, "Expect: 100-continue")
    yield head(path, length, "Upgrade: websocket", "Connection: Upgrade") + good
    yield request(path, gzip.compress(good), "Content-Encoding: gzip")
    yield request(path, gzip.compress(bytes(10_000_000)), "Content-Encoding: gzip")
    yield request(path, b" " * 20_000_000)
    yield request(path, good, method="POST") * 50  # pipelined
    yield request(path, good, "Inference-Header-Content-Length: 10")
    for body in (
        b"",
        b"null",
        b"[]",
        b"{}",
        b'""',
        b"0",
        b"{",
        b"\xff\xfe",
        b"\xef\xbb\xbf" + good,
    ):
        yield request(path, body)
    for depth in (100, 5000, 40_000):
        for left, right in ((b"[", b"]"), (b'{"a":', b"}")):
            yield request(path, left * depth + b"1" + right * depth)
            yield request(path, left * depth)
        yield request(path, good.replace(b"[", b"[" * depth, 1))
        yield request(path, good.replace(b'"' + TEXTS[0].encode(), b"[" * depth + b'"', 1))
    first = json.dumps(TEXTS[0], ensure_ascii=False).encode()
    odd = [b"null", b"1", b"1e999", b"NaN", b"-Infinity", b"9" * 5000, b"true", b"{}", b"[]", b'""']
    odd += [rb'"\ud800"', rb'"\u0000"', b'"\xff"', b'"' + b"a" * 900_000 + b'"', b'"a\nb"']
    for value in odd:
        yield request(path, good.replace(first, value))
    yield request(path, good.replace(first, b", ".join([first] * 5000)))
    yield request(path, good[:-1] + b', "surplus": 1}')
    yield request(path, good[:-1] + b", " + good[1:])
    if kind == "triton":
        classify = {"name": "label", "parameters": {"classification": 3}}
        yield request(path, value_with(kind, outputs=[classify]))
        yield request(path, value_with(kind, parameters={"sequence_id": 2**70}))
        for shape in ([], [0, 1], [-1, 1], [2**63, 1], [1, 2], ["2", 1], [2, 1, 1, 1], [10**30, 1]):
            changed = value_with(kind)
            changed["inputs"][0]["shape"] = shape
            yield request(path, changed)
        for other in (
            "/v2/repository/models/seqcls/unload",
            "/v2/systemsharedmemory/region/a/register",
        ):
            yield request(other, b"{}")
        yield request("/v2/logging", b'{"log_file": "/tmp/x"}')
        yield request("/v2/models/tokenizer/infer", good)
    if kind == "simple_serving":
        for extra in (b'"thresholds": 1e400', b'"thresholds": {"x": 1}', b'"min_labels": -1'):
            yield request(path, good[:-1] + b", " + extra + b"}")
        for extra in (b'"model": "../x"', b'"all_scores": 3', b'"max_labels": 1e9'):
            yield request(path, good[:-1] + b", " + extra + b"}")


def value_with(kind, **more):
    return json.loads(json.dumps(GOOD[kind][1])) | more


def changed(kind, rng):
    """A good request with a few bytes changed, lost or doubled; the length is often put right."""
    path, value = GOOD[kind]
    body = bytearray(json.dumps(value, ensure_ascii=rng.random() < 0.5).encode())
    raw = body if rng.random() < 0.8 else bytearray(request(path, bytes(body)))
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at, size = rng.randrange(len(raw)), rng.choice([1, 1, 4, 20])
        what = rng.random()
        if what < 0.4:
            raw[at : at + size] = rng.randbytes(size)
        elif what < 0.6:
            del raw[at : at + size]
        elif what < 0.8:
            raw[at:at] = raw[at : at + size] * rng.choice([1, 2, 100])
        else:
            raw[at : at + 1] = rng.choice(
                [b"[", b"]", b"{", b"}", b'"', b"\\", b",", b"\r\n", b"0"]
            )
        raw = raw or bytearray(b"x")
    return request(path, bytes(raw)) if raw is body or raw == body else bytes(raw)


# ---------------------------------------------------------------------------------------- attack
class Attack:
    """Hostile requests to one server; good: (texts, expected answers, ModelInfo)."""

    def __init__(self, server, good):
        self.server, (self.texts, self.expected, self.info) = server, good
        self.address = servers.HOST, server.ports["proxy" if server.with_proxy else "http"]
        self.done, self.failures, self.requests, self.wrong = threading.Event(), [], 0, 0
        self.statuses = Counter()

    def run(self, args):
        before = self.processes()
        threads = [threading.Thread(target=self.good_client, args=[i]) for i in range(2)]
        for thread in threads:
            thread.start()
        kind, rng = self.server.kind, random.Random(args.seed)
        attacks = itertools.chain(hostile(kind), (changed(kind, rng) for _ in itertools.count()))
        attacks = list(itertools.islice(attacks, args.requests))
        try:
            with ThreadPoolExecutor(ATTACKERS) as pool:
                self.statuses.update(pool.map(self.send, attacks))
            slowest = self.slow_clients(args.slow)
        finally:
            self.done.set()
            for thread in threads:
                thread.join()
        deaths = len(before - self.processes())
        for failure in self.failures[:3]:
            print(f"{self.server.kind}: a good request failed: {failure}", file=sys.stderr)
        return {
            "server": self.server.kind,
            "requests": len(attacks),
            **{f"{digit}xx": self.statuses[digit] for digit in (2, 4, 5)},
            "none": self.statuses[0],
            "deaths": deaths,
            "good_requests": self.requests,
            "wrong": self.wrong,
            "failed": len(self.failures),
            "slow": args.slow,
            "ready_s": round(slowest, 3),
        }

    def processes(self):
        """Ids of all processes of the server."""
        import psutil  # comes with visualdl

        found = set()
        for process in self.server.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                first = psutil.Process(process.pid)
                found |= {p.pid for p in [first, *first.children(recursive=True)]}
        return found

    def connect(self):
        return socket.create_connection(self.address, 20, SOURCE)

    def send(self, data):
        """The first digit of the status of the answer; 0 for none, as to half a request."""
        received = b""
        with contextlib.suppress(OSError), self.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            connection.settimeout(HURRY)
            received = connection.recv(1 << 16)
        found = re.match(rb"HTTP/1\.[01] (\d)", received)
        return int(found[1]) if found else 0

    def good_client(self, turn):
        ask = None
        while not self.done.is_set():
            turn = (turn + 7) % (len(self.texts) - 2)
            try:
                ask = ask or CLIENTS[self.server.kind](self.server)
                answers = ask(self.texts[turn : turn + 2])
                expected = self.expected[turn : turn + 2]
                self.wrong += servers.wrong_answers(answers, expected, self.info)
                self.requests += 1
            except Exception as error:  # counted and shown
                self.failures.append(repr(error))
                ask = None
            time.sleep(0.02)

    def slow_clients(self, count):
        """Seconds of the slowest readiness check while so many connections send a byte at times."""
        path, value = GOOD[self.server.kind]
        body = json.dumps(value).encode()
        starts = [head(path)[:20], head(path, f"Content-Length: {len(body)}") + body[:1]]
        connections, slowest = [], 0.0
        for i in range(count):
            with contextlib.suppress(OSError):
                connections.append(self.connect())
                connections[-1].sendall(starts[i % 2])
        end, step = time.monotonic() + (SLOW_SECONDS if count else 0), time.monotonic() + SLOW_STEP
        while time.monotonic() < end:
            start = time.perf_counter()
            ready = self.server.ready()
            slowest = max(slowest, time.perf_counter() - start if ready else float("inf"))
            if time.monotonic() > step:
                step += SLOW_STEP
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"x")
            time.sleep(0.2)
        for connection in connections:
            connection.close()
        return slowest


if __name__ == "__main__":
    utils.cli(main)
