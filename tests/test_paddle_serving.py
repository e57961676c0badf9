"""deploy/paddle_serving against the real server: same labels as predict.py, faults, SIGTERM."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from conftest import REPO, SAMPLE, needs_package
from triton_server import PATIENCE, free_ports, wait_until

import predict
import utils

FOLDER = REPO / "deploy" / "paddle_serving"
LABELS = utils.read_labels(SAMPLE / "label.txt")
TEXTS = utils.read_examples(SAMPLE / "dev.txt", LABELS)[0]

needs_package("paddle_serving_server")
needs_package("paddle_serving_app")
import convert  # noqa: E402
import grpc  # noqa: E402
import http_client  # noqa: E402
import http_front  # noqa: E402
import rpc_client  # noqa: E402
import seq_cls  # noqa: E402
import service  # noqa: E402


def write_config(folder, limits=(), **settings):
    """config.yml with free ports of this machine only, and with the changes."""
    config = yaml.safe_load((FOLDER / "config.yml").read_text(encoding="utf-8"))
    config["rpc_host"] = config["http_host"] = "127.0.0.1"
    config["rpc_port"], config["http_port"] = free_ports(2)
    op = config["op"]["seq_cls"]
    op["engine"] = "paddle"  # the harder one
    groups = [config["limits"], op, op["local_service_conf"]]
    for name, value in {**dict(limits), **settings}.items():
        next((group for group in groups if name in group), config)[name] = value
    (folder / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return config["rpc_port"], config["http_port"]


class Server:
    """service.py, or another script in its place, in a process of its own on free ports."""

    def __init__(self, folder, script=FOLDER / "service.py", **settings):
        self.ports = write_config(folder, **settings)
        self.rpc, self.http = f"127.0.0.1:{self.ports[0]}", f"http://127.0.0.1:{self.ports[1]}"
        command = [sys.executable, script, "--config", "config.yml"]
        self.log = folder / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def wait_until_ready(self):
        def ready():
            assert self.process.poll() is None, self.log.read_text()
            return http_client.ready(self.http) and rpc_client.ready(self.rpc)

        wait_until(ready, self.log.read_text)
        return self

    def processes(self):
        """{pid: parent} of the server's processes; they all name its configuration folder."""
        found = {}
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.readlink(f"/proc/{entry}/cwd") == str(self.log.parent):
                    stat = open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()
                    if stat[0] != "Z":
                        found[int(entry)] = int(stat[1])
            except OSError:  # it has just ended
                pass
        return found

    def worker(self):
        """The process id of service.py's child; None if there is none."""
        pairs = self.processes().items()
        return next((pid for pid, parent in pairs if parent == self.process.pid), None)

    def assert_gone(self):
        """No process is left and both ports are free."""

        def gone():
            try:
                for port in self.ports:
                    service.check_port("127.0.0.1", port)
            except OSError:
                return False
            return not self.processes()

        wait_until(gone, lambda: f"left: {self.processes()}, ports {self.ports}")

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) == 0
        self.assert_gone()


@pytest.fixture(scope="module")
def model(bundle, tmp_path_factory):
    """A folder with the models of convert.py for both engines."""
    folder = tmp_path_factory.mktemp("paddle_serving")
    convert.main(
        ["--dirname", str(bundle), "--serving_server", str(folder / "serving_server")]
        + ["--serving_client", str(folder / "serving_client")]
    )
    return folder


@pytest.fixture(scope="module")
def server(model):
    server = Server(model).wait_until_ready()
    yield server
    server.stop()


@pytest.fixture
def own_server(model, tmp_path):
    """start(**settings): a server that a test may kill."""
    servers = []

    def start(**settings):
        shutil.copytree(model / "serving_server", tmp_path / "serving_server")
        servers.append(Server(tmp_path, **settings))
        return servers[-1].wait_until_ready()

    yield start
    for one in servers:
        if one.process.poll() is None:
            one.stop()


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """[(label names, {label: score})] of predict.py for the sample's dev texts."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "data.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    flags = ["--device", "cpu", "--dataset_dir", folder, "--params_path", checkpoint]
    flags += ["--output_file", folder / "o.jsonl", "--output_scores"]
    predict.main([str(flag) for flag in flags])
    rows = [json.loads(line) for line in open(folder / "o.jsonl", encoding="utf-8")]
    return [(row["labels"], row["scores"]) for row in rows]


def check(answers, expected):
    assert [names for names, _ in answers] == [names for names, _ in expected]
    for (names, scores), (_, all_scores) in zip(answers, expected):
        np.testing.assert_allclose(scores, [all_scores[n] for n in names], rtol=0, atol=1e-4)


def works(server, expected):
    """Both ways into the server answer, and correctly."""
    check(http_client.predict(server.http, TEXTS[:20]), expected[:20])
    check(rpc_client.predict(server.rpc, TEXTS[20:40]), expected[20:40])


def post(server, body, path="/seq_cls/prediction"):
    """(HTTP status, reply as text)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports[1], timeout=PATIENCE)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode("utf-8")
    connection.close()
    return answer.status, text


# ------------------------------------------------------------------------------------ the answers
def test_all_dev_texts(server, expected):
    assert any(not names for names, _ in expected) and len(TEXTS) == 400
    for client, url in ((http_client, server.http), (rpc_client, server.rpc)):
        chunks = utils.chunks(TEXTS, 150)
        check([answer for chunk in chunks for answer in client.predict(url, chunk)], expected)
        check([client.predict(url, [text])[0] for text in TEXTS[:30]], expected[:30])
    one_string = json.dumps({"key": ["sentence"], "value": [json.dumps(TEXTS[0])]})
    assert json.loads(json.loads(post(server, one_string)[1])["value"][0]) == [expected[0][0]]


def test_texts_of_the_longest_length(server, checkpoint):
    """Padding must not go beyond the positions that the model has."""
    for count in (126, 127, 500):
        ((names, scores),) = http_client.predict(server.http, ["离婚" * count])
        assert len(names) == len(scores)


def test_clients_as_commands(server, expected, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS[:5], ""]), encoding="utf-8")
    for script, url in (("http_client.py", server.http), ("rpc_client.py", server.rpc)):
        command = [sys.executable, FOLDER / script, "--url", url]
        flags = ["--data_file", tmp_path / "texts.txt", "--batch_size", "2"]
        run = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        lines = run.stdout.splitlines()
        assert lines[0::4] == [f"data:  {text}" for text in TEXTS[:5]]
        assert lines[1::4] == [f"label:  {','.join(names)}" for names, _ in expected[:5]]
        run = subprocess.run([*command, "--ready"], capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "ready\n")


def test_empty_text_is_an_ordinary_text(server):
    for client, url in ((http_client, server.http), (rpc_client, server.rpc)):
        (names, scores), _ = client.predict(url, ["", TEXTS[0]])
        assert len(names) == len(scores)


def test_decision_rule_of_the_bundle(model, own_server, limited):
    _, bundle, texts, expected = limited
    path = model / "serving_server" / "config.json"
    text = path.read_text(encoding="utf-8")
    try:
        shutil.copy(bundle / "config.json", path)
        one = own_server()
    finally:
        path.write_text(text, encoding="utf-8")
    answers = [
        a for chunk in utils.chunks(texts, 200) for a in http_client.predict(one.http, chunk)
    ]
    assert [names for names, _ in answers] == expected
    assert all(len(names) == len(scores) for names, scores in answers)
    assert rpc_client.predict(one.rpc, texts[:9]) == answers[:9]


# ---------------------------------------------------------------------------------------- merging
@pytest.mark.parametrize("capacity", [None, 0, 4, 8])
def test_texts_of_like_length_run_together(capacity):
    """In any order, with [PAD] inside a text, up to the last position of the model."""
    rng, shapes = np.random.default_rng(3), []

    def forward(input_ids, token_type_ids):
        assert input_ids.shape == token_type_ids.shape and not token_type_ids.any()
        shapes.append(input_ids.shape)
        return np.stack([input_ids.sum(axis=1), input_ids.max(axis=1)], axis=1)

    sequences = [rng.integers(0, 99, size=n) for n in rng.integers(2, 61, size=90)]
    for ids in sequences:
        ids[-1] = 2  # [SEP]
    info = types.SimpleNamespace(max_seq_length=60, max_position=60)
    flags = {} if capacity is None else seq_cls.few_shapes(capacity, info)
    results = seq_cls.by_length(forward, **flags)(**utils.pad(sequences))
    np.testing.assert_array_equal(results, [[ids.sum(), ids.max()] for ids in sequences])
    lengths = {None: None, 0: {16, 32, 48, 60}, 4: {32, 60}, 8: {16, 32, 48, 60}}[capacity]
    if lengths:
        assert {size for size, _ in shapes} <= {1, 4} and {n for _, n in shapes} == lengths
    else:
        assert len(shapes) <= 8 and max(size for size, _ in shapes) > 8


def test_engine_that_is_chosen(model, tmp_path):
    shutil.copytree(model / "serving_server", tmp_path / "serving_server")

    def engine(**settings):
        write_config(tmp_path, **settings)
        return service.read_config(tmp_path / "config.yml")["op"]["seq_cls"]["engine"]

    assert [engine(engine=name) for name in ("auto", "paddle")] == ["onnxruntime", "paddle"]
    assert engine(engine="auto", device_type=1, devices="0") == "paddle"
    (tmp_path / "serving_server" / "model.onnx").unlink()
    assert [engine(engine=name) for name in ("auto", "onnxruntime")] == ["paddle", "onnxruntime"]


@pytest.mark.parametrize("engine", ["paddle", "onnxruntime"])
def test_many_clients_at_once(own_server, expected, engine):
    """Whatever is merged with whatever, each gets its own answers."""
    one = own_server(engine=engine, concurrency=3)
    if engine == "onnxruntime":
        assert "libpaddle" not in open(f"/proc/{one.worker()}/maps").read()
    rng, calls = random.Random(1), []
    for i in range(200):
        start = rng.randrange(380)
        client, url = ((http_client, one.http), (rpc_client, one.rpc))[i % 2]
        calls.append((client, url, start, start + rng.choice([1, 1, 1, 2, 5, 20])))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda c: c[0].predict(c[1], TEXTS[c[2] : c[3]]), calls))
    for (_, _, start, end), answer in zip(calls, answers):
        check(answer, expected[start:end])


# Stands in for service.py's child process. The model waits at HOLD until the file `go` is there,
# and cannot do FAIL. A line of `queued` is a request that waits, one of `batches` what is run.
FAILING = """
import os, sys, time
sys.path[:0] = [{folder!r}, {root!r}]
import seq_cls, service, utils
def note(name, line):
    with open(name, "a") as file:
        print(line, file=file)
def counting(log_dir):
    result = imported(log_dir)
    from paddle_serving_server.pipeline.channel import ThreadChannel
    push = ThreadChannel.push
    ThreadChannel.push = lambda *args: (push(*args), note("queued", ""))
    return result
imported, seq_cls.import_pipeline = seq_cls.import_pipeline, counting
decide = utils.Labeller.decide
def failing(self, texts):
    note("batches", len(texts))
    while "HOLD" in texts and not os.path.exists("go"):
        time.sleep(0.01)
    if "FAIL" in texts:
        raise RuntimeError("no luck\\nwith it")
    return decide(self, texts)
utils.Labeller.decide = failing
utils.cli(lambda: service.main([*sys.argv[1:], "--worker"]))
"""


def test_a_failing_text_and_its_neighbours(model, tmp_path, expected):
    shutil.copytree(model / "serving_server", tmp_path / "serving_server")
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(folder=str(FOLDER), root=str(REPO)), encoding="utf-8")
    one = Server(tmp_path, script, concurrency=1).wait_until_ready()
    fail = {"key": ["sentence"], "value": ['["好", "FAIL"]']}

    def failing_post():
        connection = http.client.HTTPConnection("127.0.0.1", one.ports[1], timeout=PATIENCE)
        headers = {"X-Request-ID": "mine"}
        connection.request("POST", "/seq_cls/prediction", json.dumps(fail), headers)
        answer = connection.getresponse()
        reply = answer.status, json.loads(answer.read())
        connection.close()
        return reply

    def lines(name):
        path = tmp_path / name
        return path.read_text().splitlines() if path.exists() else []

    def failing_call():
        raw = rpc_client.Request(**fail).SerializeToString() + b"\x30\x4d"  # logid: 77
        with grpc.insecure_channel(one.rpc) as channel:
            call = channel.unary_unary(rpc_client.METHOD, None, rpc_client.Response.FromString)
            reply = call(raw, timeout=PATIENCE)
        return reply.err_no, reply.err_msg

    message = "the prediction failed; the server's log has the reason"
    with ThreadPoolExecutor(8) as pool:
        held = pool.submit(http_client.predict, one.http, ["HOLD"], PATIENCE)
        wait_until(lambda: lines("batches"), one.log.read_text)
        good = [pool.submit(http_client.predict, one.http, [TEXTS[i]], PATIENCE) for i in range(4)]
        good.append(pool.submit(rpc_client.predict, one.rpc, TEXTS[4:6], PATIENCE))
        bad, bad_rpc = pool.submit(failing_post), pool.submit(failing_call)
        wait_until(lambda: len(lines("queued")) == 8, one.log.read_text)
        (tmp_path / "go").touch()
        held.result()
        check([answer for future in good for answer in future.result()], expected[:6])
        assert bad.result() == (500, {"err_no": 54, "err_msg": message, "key": [], "value": []})
        assert bad_rpc.result() == (54, message)
    assert lines("batches") == ["1", "10"] + 10 * ["1"]
    reasons = [line for line in one.log.read_text().splitlines() if "RuntimeError" in line]
    reason = "failed (error 54): RuntimeError: no luck with it"
    assert sorted(line.partition("] - ")[2] for line in reasons) == [
        f"request mine {reason}",
        f"request with log id 77 {reason}",
    ]
    assert "FAIL" not in one.log.read_text() and "好" not in one.log.read_text()
    one.stop()


# ----------------------------------------------------------------------------------------- faults
BAD_VALUES = {
    "no JSON": ("婚后", "sentence is not JSON"),
    "Python instead of JSON": ("array([b'x'], dtype=object)", "sentence is not JSON"),
    "code": ("__import__('os').abort()", "sentence is not JSON"),
    "number": ("1", "must be a JSON string or a list of strings"),
    "object": ('{"a": 1}', "must be a JSON string or a list of strings"),
    "list of numbers": ("[1, 2]", "must be a JSON string or a list of strings"),
    "nested": ('[["a"]]', "must be a JSON string or a list of strings"),
    "deep": ("[" * 100_000, "sentence is not JSON"),
    "empty list": ("[]", "empty list; send at least one text"),
    "many texts": (json.dumps(["a"] * 257), "257 texts; send at most 256"),
    "long text": (json.dumps(["a", "长" * 40_000]), "text 1 has 120000 bytes; at most 32768"),
    "surrogate": ('["\\ud800"]', "text 0: invalid Unicode (lone surrogate)"),
}


@pytest.mark.parametrize("value, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_sentence(server, value, message):
    status, text = post(server, json.dumps({"key": ["sentence"], "value": [value]}))
    assert status == 400 and json.loads(text)["err_no"] == 51
    assert message in json.loads(text)["err_msg"]
    request = rpc_client.Request(key=["sentence"], value=[value])
    reply = rpc_client.call(server.rpc, request, PATIENCE)
    assert reply.err_no == 51 and message in reply.err_msg


BAD_BODIES = {
    "nothing": (b"", 400, "not a request in UTF-8 JSON"),
    "half an object": (b"{", 400, "not a request in UTF-8 JSON"),
    "invalid UTF-8": (
        b'{"key": ["sentence"], "value": ["\\"\xff\\""]}',
        400,
        "not a request in UTF-8",
    ),
    "list": (b"[1]", 400, "not an object"),
    "deep": (b"[" * 100_000, 400, "not a request in UTF-8 JSON"),
    "no key": (b"{}", 400, "send key"),
    "other key": (b'{"key": ["text"], "value": ["\\"a\\""]}', 400, "send key"),
    "no value": (b'{"key": ["sentence"], "value": []}', 400, "send key"),
    "twice": (b'{"key": ["sentence", "sentence"], "value": ["\\"a\\""]}', 400, "send key"),
    "strings": (b'{"key": "sentence", "value": "a"}', 400, "key and value must be lists"),
    "number": (b'{"key": ["sentence"], "value": [1]}', 400, "not a request in UTF-8 JSON"),
    "surrogate": (b'{"key": ["sentence"], "value": ["\\ud800"]}', 400, "not a request"),
    "tensors": (b'{"tensors": [{"name": "sentence", "elem_type": 13}]}', 400, "tensors are not"),
    "10 MB": (b'{"key": ["sentence"], "value": ["%s"]}' % (b"a" * 10**7), 413, "more than 1048576"),
}


@pytest.mark.parametrize("body, status, message", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_body(server, expected, body, status, message):
    answer_status, text = post(server, body)
    assert answer_status == status and message in text, text[:200]
    check(http_client.predict(server.http, TEXTS[:2]), expected[:2])


def raw(server, data):
    """Everything that the server sends for these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.ports[1]), timeout=PATIENCE) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_a_body_that_is_announced_but_does_not_come(server):
    """Neither read into memory nor waited for."""
    head = b"POST /seq_cls/prediction HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
    answer = raw(server, head + b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
    reply = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert reply == {"error": "the body has more than 1048576 bytes"}


def test_a_chunked_body(server, expected):
    connection = http.client.HTTPConnection("127.0.0.1", server.ports[1], timeout=PATIENCE)
    body = json.dumps({"key": ["sentence"], "value": [json.dumps(TEXTS[:2])]}).encode()
    connection.request("POST", "/seq_cls/prediction", iter([body[:9], body[9:]]))
    reply = json.loads(connection.getresponse().read())
    connection.close()
    check(http_client.unpack(**reply, count=2), expected[:2])


def test_methods(server):
    """JSON for every one of them; HEAD is GET without a body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports[1], timeout=PATIENCE)
    for method, path, status, allow in (
        ("GET", "/seq_cls/ready", 200, None),
        ("HEAD", "/seq_cls/ready", 200, None),
        ("GET", "/seq_cls/prediction", 405, "POST"),
        ("HEAD", "/seq_cls/prediction", 405, "POST"),
        ("POST", "/seq_cls/ready", 405, "GET"),
        ("PUT", "/seq_cls/prediction", 405, "POST"),
        ("DELETE", "/seq_cls/ready", 405, "GET"),
        ("OPTIONS", "/", 404, None),
    ):
        connection.request(method, path, headers={"X-Request-ID": f"{method} 7"})
        answer = connection.getresponse()
        text = answer.read()
        assert (answer.status, answer.headers["Allow"]) == (status, allow)
        assert answer.headers["X-Request-ID"] == f"{method} 7"
        assert answer.headers["Content-Type"].startswith("application/json")
        if method == "HEAD":
            assert text == b"" and int(answer.headers["Content-Length"]) > 0
        else:
            assert json.loads(text)["err_no"] == (0 if status == 200 else 51)
    connection.close()


def test_no_request_is_smuggled_in_a_body(server):
    hidden = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
    size = b"Content-Length: %d\r\n" % len(hidden)
    last = b"Connection: close\r\n"
    answer = raw(server, b"GET /seq_cls/ready HTTP/1.1\r\nHost: x\r\n" + size + last
                 + b"\r\n" + hidden)  # fmt: skip
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 200")
    for headers in (
        size + b"Content-Length: 0\r\n",
        b"Content-Length: 0\r\n" + size,
        size + b"Transfer-Encoding: chunked\r\n",
    ):
        head = b"POST /seq_cls/prediction HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n"
        answer = raw(server, head + hidden)
        assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_invalid_utf8_over_grpc(server, expected):
    raw = b'\x0a\x08sentence\x12\x04"\xff\xfe"'  # key: "sentence", value: invalid bytes
    with grpc.insecure_channel(server.rpc) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(rpc_client.METHOD)(raw, timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    works(server, expected)


def test_byte_tensors_are_not_unpickled(server, tmp_path):
    """Paddle Serving's own unpacking calls np.load(allow_pickle=True) on them."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    def field(number, data):
        tag = number << 3 | 2
        tag = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
        size = len(data)
        return tag + (bytes([size & 127 | 128, size >> 7])) + data

    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    kind = b"\xa0\x01\x0d"  # elem_type: 13, bytes
    tensor = field(10, file.getvalue()) + kind + field(23, b"sentence")
    with grpc.insecure_channel(server.rpc) as channel:
        call = channel.unary_unary(rpc_client.METHOD, None, rpc_client.Response.FromString)
        reply = call(field(3, tensor), timeout=PATIENCE)
    assert reply.err_no == 51 and "no tensors" in reply.err_msg
    assert not (tmp_path / "pwned").exists()


def test_unknown_paths_and_names(server):
    for path in ("/other/prediction", "/seq_cls/other", "/"):
        status, text = post(server, b"{}", path)
        assert status == 404
        assert "use POST /seq_cls/prediction or GET /seq_cls/ready" in json.loads(text)["err_msg"]
    for names in ({"name": "other"}, {"method": "other"}, {"name": "x" * 1_000_000}):
        reply = rpc_client.call(server.rpc, rpc_client.Request(**names), PATIENCE)
        assert reply.err_no == 51 and "use the service seq_cls" in reply.err_msg
    logs = server.log.parent / "PipelineServingLogs"
    assert sum(path.stat().st_size for path in logs.iterdir()) < 1_000_000


def test_a_client_that_goes_away(server, expected):
    body = json.dumps({"key": ["sentence"], "value": [json.dumps(TEXTS[:256])]}).encode()
    head = f"POST /seq_cls/prediction HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    for part in (body, body[: len(body) // 2]):
        with socket.create_connection(("127.0.0.1", server.ports[1])) as sock:
            sock.sendall(head.encode() + part)
    works(server, expected)


def test_bad_requests_do_not_touch_good_ones(server, expected):
    good = [lambda i=i: http_client.predict(server.http, [TEXTS[i]])[0] for i in range(60)]
    bad = [lambda v=v: post(server, json.dumps({"key": ["sentence"], "value": [v[0]]}))
           for v in list(BAD_VALUES.values()) * 5]  # fmt: skip
    calls = [(i, call) for i, call in enumerate(good)] + [(None, call) for call in bad]
    random.Random(0).shuffle(calls)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: (pair[0], pair[1]()), calls))
    answers = [answer for i, answer in sorted(a for a in answers if a[0] is not None)]
    check(answers, expected[:60])


def test_fuzz(server, expected):
    """500 random requests, raw and half-right, over HTTP and gRPC."""
    rng, seen = random.Random(5), set()

    def noise(size):
        return bytes(rng.randrange(256) for _ in range(rng.randrange(size)))

    def value():
        kinds = [None, True, 1e400, -1, "a", noise(20).decode("latin1"), [], {}, ["x", None]]
        return rng.choice([json.dumps(rng.choice(kinds)), noise(30).decode("latin1")])

    with grpc.insecure_channel(server.rpc) as channel:
        raw_call = channel.unary_unary(rpc_client.METHOD)
        for i in range(500):
            if i % 5 == 0:
                try:
                    raw_call(noise(60), timeout=PATIENCE)
                except grpc.RpcError as error:
                    seen.add(error.code())
                continue
            keys = [rng.choice(["sentence", "", "x", 3]) for _ in range(rng.randrange(3))]
            body = {"key": keys, "value": [value() for _ in range(rng.randrange(3))]}
            body = json.dumps(body).encode()
            if i % 5 < 3:
                cut = rng.randrange(len(body))
                body = rng.choice([noise(80), body[:cut] + noise(9) + body[cut:]])
            seen.add(post(server, body)[0])
            if i % 100 == 1:
                works(server, expected)
    assert {400, grpc.StatusCode.INTERNAL} <= seen
    works(server, expected)


# -------------------------------------------------------------------------------- life and death
def test_a_busy_server_and_sigterm(own_server, expected):
    """With all places taken, further requests are refused, `ready` answers, and SIGTERM waits."""
    one = own_server(max_requests=4, drain_seconds=PATIENCE)

    def answers(number):
        """Of one request, which is sent until there is a place for it."""
        ask, url = (http_client, one.http) if number % 2 else (rpc_client, one.rpc)
        while True:
            try:
                return ask.predict(url, TEXTS[:128], PATIENCE)
            except http_client.ServerError as error:
                assert str(error) == "error 52: server busy; retry later"
                time.sleep(0.05)

    def requests_in_all_places(count):
        futures, request = [], rpc_client.Request(key=["sentence"], value=["[]"])

        def busy():
            if all(future.done() for future in futures):  # too fast for us: once more
                futures[:] = [pool.submit(answers, i) for i in range(count)]
            return rpc_client.call(one.rpc, request, PATIENCE).err_no == 52

        wait_until(busy, one.log.read_text)
        return futures

    with ThreadPoolExecutor(8) as pool:
        twice_as_many = requests_in_all_places(8)
        assert http_client.ready(one.http, PATIENCE) and rpc_client.ready(one.rpc, PATIENCE)
        for future in twice_as_many:
            check(future.result(), expected[:128])
        accepted = requests_in_all_places(4)
        one.process.terminate()
        for future in accepted:
            check(future.result(), expected[:128])
    assert one.process.wait(PATIENCE) == 0
    one.assert_gone()


def test_sigterm_and_keep_alive_clients(own_server):
    """No HTTP connection is cut before an answer has said so; gRPC says UNAVAILABLE first."""
    one = own_server(drain_seconds=PATIENCE)
    body = json.dumps({"key": ["sentence"], "value": [json.dumps(TEXTS[0])]})
    request = rpc_client.Request(key=["sentence"], value=[json.dumps(TEXTS[0])])
    counts = [0] * 8

    def over_http(number):
        connection = http.client.HTTPConnection("127.0.0.1", one.ports[1], timeout=PATIENCE)
        connection.connect()
        while True:
            connection.request("POST", "/seq_cls/prediction", body)
            answer = connection.getresponse()
            reply = json.loads(answer.read())
            assert (answer.status, reply["err_no"]) == (200, 0)
            counts[number] += 1
            if answer.headers["Connection"] == "close":
                return connection.close()

    def over_grpc(number, call):
        while True:
            try:
                assert call(request, timeout=PATIENCE).err_no == 0
            except grpc.RpcError as error:
                return error.code(), error.details()
            counts[number] += 1

    with ThreadPoolExecutor(8) as pool, grpc.insecure_channel(one.rpc) as channel:
        kinds = rpc_client.Request.SerializeToString, rpc_client.Response.FromString
        call = channel.unary_unary(rpc_client.METHOD, *kinds)
        https = [pool.submit(over_http, i) for i in range(4)]
        grpcs = [pool.submit(over_grpc, i, call) for i in range(4, 8)]
        wait_until(lambda: min(counts) > 3, lambda: f"{counts} {one.log.read_text()}")
        one.process.terminate()
        assert [future.result() for future in https] == [None] * 4
        ends = [future.result() for future in grpcs]
        assert {code for code, _ in ends} == {grpc.StatusCode.UNAVAILABLE}, ends
        assert "the server is stopping; retry elsewhere" in {details for _, details in ends}
    assert one.process.wait(PATIENCE) == 0
    one.assert_gone()


def test_slow_clients(own_server, expected):
    """300 connections that send a byte now and then keep nobody from HTTP."""
    one = own_server(receive_seconds=PATIENCE)
    address, head = ("127.0.0.1", one.ports[1]), b"POST /seq_cls/prediction HTTP/1.1\r\nX-Slow: "
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(address)) for _ in range(300)]
        for sock in socks:
            sock.sendall(head)

        def ready_within_a_second():
            for sock in socks:
                with contextlib.suppress(OSError):  # one that had to give way
                    sock.sendall(b"x")
            return http_client.ready(one.http, timeout=1)

        for _ in range(5):
            wait_until(ready_within_a_second, one.log.read_text)
        check(http_client.predict(one.http, TEXTS[:1]), expected[:1])
        check(rpc_client.predict(one.rpc, TEXTS[:1]), expected[:1])
    wait_until(lambda: post(one, "{}")[0] == 400, one.log.read_text)
    check(http_client.predict(one.http, TEXTS[:1]), expected[:1])


def test_a_request_must_arrive_in_time(own_server):
    one = own_server(receive_seconds=1)
    head = b"POST /seq_cls/prediction HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    for part in (head[:20], head + b"{"):
        answer = raw(one, part)
        assert answer.startswith(b"HTTP/1.1 408")
        reason = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert reason == "the request was not complete within 1 s"


def test_the_start_prints_one_line(own_server, tmp_path):
    one = own_server(log_dir="some/logs")
    wait_until(lambda: "ready;" in one.log.read_text(), one.log.read_text)
    lines = one.log.read_text().splitlines()
    (line,) = (line for line in lines if not line.startswith("{"))  # access lines of the waiting
    assert line.endswith(f"ready; health check: {one.http}/seq_cls/ready")
    assert {json.loads(line)["path"] for line in lines if line[0] == "{"} == {"/seq_cls/ready"}
    logs = tmp_path / "some" / "logs" / "PipelineServingLogs"
    assert "[PipelineServicer] succ init" in (logs / "output.log").read_text()
    assert not (tmp_path / "PipelineServingLogs").exists()


def test_sigterm_while_it_starts(model, tmp_path):
    shutil.copytree(model / "serving_server", tmp_path / "serving_server")

    def loads_paddle(one):
        with contextlib.suppress(OSError):  # it has just ended
            return (pid := one.worker()) and "libpaddle" in open(f"/proc/{pid}/maps").read()

    for stage in (lambda one: True, Server.worker, loads_paddle):
        one = Server(tmp_path)
        wait_until(lambda stage=stage, one=one: stage(one), one.log.read_text)
        one.process.terminate()
        status = one.process.wait(PATIENCE)
        if status == -signal.SIGTERM:  # Python was still importing
            assert one.log.read_text() == "" and stage != Server.worker
        else:
            assert status in (0, 143)  # 143: before it has begun
        one.assert_gone()


def test_a_killed_process_is_replaced(own_server, expected):
    one = own_server()
    worker = one.worker()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: one.worker() not in (worker, None), one.log.read_text)
    one.wait_until_ready()
    works(one, expected)
    assert "the server ended with exit status -9; restarting it" in one.log.read_text()
    one.stop(signal.SIGINT)


def test_the_supervisor_takes_all_with_it(own_server):
    one = own_server()
    one.process.kill()
    one.process.wait()
    one.assert_gone()


# -------------------------------------------------------------------------------------- bad set-up
def fails(folder, *flags):
    command = [sys.executable, FOLDER / "service.py", *flags]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    return run.stderr


def test_bad_configuration(model, server, tmp_path):
    assert "none.yml: No such file" in fails(tmp_path, "--config", "none.yml")
    text = (FOLDER / "config.yml").read_text(encoding="utf-8")
    for old, new, message in (
        ("limits:", "limit:", "limit: unknown key; known are rpc_host, rpc_port, http_host, "),
        ("max_texts:", "max_text:", "limits.max_text: unknown key; known are max_body_bytes, "),
        ("  seq_cls:", "  other:", "op.other: unknown key; known are seq_cls"),
        ("concurrency:", "workers:", "op.seq_cls.workers: unknown key; known are local_service_"),
        ("thread_num", "thread", "op.seq_cls.local_service_conf.thread: unknown key; known are mo"),
        ("model_config: serving_server", "", "local_service_conf.model_config is missing; compare"),
        ("rpc_port: 18090", "", "config.yml: rpc_port is missing; compare config.yml"),
        (
            text,
            "[1]",
            "the file must have the keys rpc_host, rpc_port, http_host, http_port, limit",
        ),
        ("log_dir: .", "log_dir: 3", "log_dir: 3 is not the path of a folder"),
        (
            "log_dir: .",
            "log_dir: config.yml",
            "config.yml/PipelineServingLogs (Not a directory); n",
        ),
        ("engine: auto", "engine: torch", "engine: torch; known are auto, paddle, onnxruntime"),
        ("concurrency: 2", "concurrency: 0", "concurrency: 0 is not a positive integer"),
        ("max_texts: 256", "max_texts: x", "max_texts: x is not a positive integer"),
        ("max_texts: 256", "max_texts: true", "max_texts: True is not a positive integer"),
        ("device_type: 0", "device_type: 7", "device_type 7: 0 (CPU) and 1 (GPU) are supported"),
        ("device_type: 0", "device_type: 1", 'devices "": give the number of one GPU'),
        ("http_port: 9878", "http_port: 18090", "rpc_port and http_port are the same"),
        ("rpc_port: 18090", "rpc_port: [", "not valid YAML"),
    ):
        (tmp_path / "config.yml").write_text(text.replace(old, new), encoding="utf-8")
        assert text.count(old) and message in fails(tmp_path)
    taken, model_folder = server.ports[0], str(model / "serving_server")
    for settings, message in (
        ({}, "serving_server: no model for Paddle Serving; run convert.py first"),
        ({"rpc_port": taken}, f"cannot listen on 127.0.0.1:{taken}: Address already in use"),
        ({"http_port": 70_000}, "cannot listen on 127.0.0.1:70000: bind(): port must be 0-65535."),
        ({"rpc_host": "10.99.1.2"}, "cannot listen on 10.99.1.2:"),
        ({"http_host": 1}, "cannot listen on 1:"),
        # Found by Paddle Serving itself.
        ({"model_config": model_folder, "ir_optim": "x"}, "ir_optim must be <class 'bool'>"),
    ):
        write_config(tmp_path, **settings)
        assert message in fails(tmp_path)


def test_a_model_cut_short(model, tmp_path):
    shutil.copytree(model / "serving_server", tmp_path / "serving_server")
    path = tmp_path / "serving_server" / "float32.pdiparams"
    path.write_bytes(path.read_bytes()[:1000])
    write_config(tmp_path)
    assert "not the files that config.json beside them describes" in fails(tmp_path)


def test_convert(model, bundle, checkpoint, tmp_path, run_cli):
    files = {"float32.pdmodel", "float32.pdiparams", "config.json", "vocab.txt"}
    files |= {"tokenizer_config.json", "serving_server_conf.prototxt", "model.onnx"}
    assert {p.name for p in (model / "serving_server").iterdir()} == {
        *files,
        "serving_server_conf.stream.prototxt",
    }
    assert len(list((model / "serving_client").iterdir())) == 2
    targets = ["--serving_server", tmp_path / "s", "--serving_client", tmp_path / "c"]
    for folder, message in ((checkpoint, "a checkpoint, not a bundle"), ("no", "no such folder")):
        status, err = run_cli(convert.main, ["--dirname", folder, *targets])
        assert status == 2 and message in err
    (tmp_path / "link").symlink_to(bundle)
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    for flag in ("--serving_server", "--serving_client"):
        same = ["--dirname", bundle, *targets, flag, tmp_path / "link"]
        status, err = run_cli(convert.main, same)
        assert status == 2 and f"{flag} {tmp_path}/link is the bundle itself" in err
    assert [p.name for p in tmp_path.iterdir()] == ["link"]
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before


# ---------------------------------------------------------------------------------------- clients
SCRIPTS = {"http_client.py": "http://127.0.0.1:{}", "rpc_client.py": "127.0.0.1:{}"}


@pytest.mark.parametrize("script, url", SCRIPTS.items())
def test_no_server(script, url):
    url = url.format(*free_ports(1))
    command = [sys.executable, FOLDER / script, "--url", url]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith(f"error: no answer from {url}")
    assert len(run.stderr.splitlines()) == 1
    run = subprocess.run([*command, "--ready"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "not ready\n")
    run = subprocess.run([*command, "--batch_size", "0"], capture_output=True, text=True)
    assert run.returncode == 2 and "must be positive" in run.stderr


@pytest.mark.parametrize("script, url", SCRIPTS.items())
def test_ctrl_c_in_a_client(script, url):
    """While it waits for an answer that does not come."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        url = url.format(silent.getsockname()[1])
        command = [sys.executable, FOLDER / script, "--url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            connection, _ = silent.accept()
            assert connection.recv(1)  # it asks
            process.send_signal(signal.SIGINT)
            assert (process.wait(PATIENCE), process.stderr.read()) == (130, b"")
            connection.close()


@pytest.mark.parametrize("script, url", SCRIPTS.items())
def test_a_reader_that_has_seen_enough(server, tmp_path, script, url):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 5), encoding="utf-8")
    url = url.format(server.ports[script == "http_client.py"])
    command = [sys.executable, FOLDER / script, "--url", url]
    command += ["--data_file", tmp_path / "texts.txt"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == f"data:  {TEXTS[0]}\n".encode()
        process.stdout.close()
        assert (process.wait(PATIENCE), process.stderr.read()) == (141, b"")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_lines_of_a_data_file(tmp_path, end):
    """As utils.read_texts has them, so that answer n is that of line n."""
    odd = "\ufeff一\r二\n\r\n三\r\r\n\x0b\x0c\x1c\x85\u2028\n\ufeff四".encode()
    (tmp_path / "texts.txt").write_bytes(odd + end)
    texts = http_client.read_texts(tmp_path / "texts.txt")
    assert texts == list(utils.read_texts(tmp_path / "texts.txt"))
    assert texts[:3] == ["一\r二", "", "三\r"]


def test_bad_data_files(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    for name, message in (
        ("none.txt", "none.txt"),
        ("empty.txt", "empty.txt: empty file; write one text per line"),
        ("bad.txt", "bad.txt:2: not valid UTF-8; save it as UTF-8"),
    ):
        command = [sys.executable, FOLDER / "http_client.py", "--data_file", name]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 2 and message in run.stderr and len(run.stderr.splitlines()) == 1


def test_a_reply_of_another_server():
    for text in ("[]", "{}", '{"status": "ok"}'):
        reply = json.loads(text)
        with pytest.raises(http_client.ServerError):
            http_client.unpack(0, "", list(reply), list(reply), 1)
    with pytest.raises(http_client.ServerError, match="0 answers to 1 texts"):
        http_client.unpack(0, "", ["label", "score"], ["[]", "[]"], 1)


@pytest.mark.parametrize("loaded, stopping, status", [(1, 0, 200), (0, 0, 503), (1, 1, 503)])
def test_readiness(loaded, stopping, status):
    """503 until the model is there, and from SIGTERM on."""
    limits = yaml.safe_load((FOLDER / "config.yml").read_text(encoding="utf-8"))["limits"]
    servicer = types.SimpleNamespace(ready=lambda: bool(loaded))
    front, sent = http_front.make_front(servicer, limits), []
    front.stopping = bool(stopping)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/seq_cls/ready", "method": "GET", "access": {}}
    asyncio.run(front.app({**scope, "front": front}, None, send))
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"])["err_no"] == (0 if status == 200 else 53)


def test_limits_are_checked_before_the_model():
    limits = {"max_texts": 2, "max_text_bytes": 3}
    assert seq_cls.parse_texts('"长"', limits) == ["长"]
    assert seq_cls.parse_texts('["a", ""]', limits) == ["a", ""]
    for value in ('["a", "b", "c"]', '["长a"]', "[]", "null"):
        with pytest.raises(ValueError):
            seq_cls.parse_texts(value, limits)
