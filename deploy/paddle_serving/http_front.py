"""HTTP for service.py: POST /seq_cls/prediction, GET /seq_cls/ready, in Paddle Serving's format.

It replaces Paddle Serving's gateway, which reads bodies of any size into memory, has no time limit,
listens on all addresses and exists for x86 only.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from seq_cls import BAD_REQUEST, BUSY, NAME, NOT_READY

USAGE = f"use POST /{NAME}/prediction or GET /{NAME}/ready"
MAX_DISCARDED = 1 << 24  # bytes of a body that is too large


class HttpServer(ThreadingHTTPServer):
    """Answers with `servicer`, which has Request, inference(request, context) and ready()."""

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
        """The library would print a traceback for every client that disconnects."""

    def count(self, change):
        with self.lock:
            self.active += change

    def drain(self, seconds):
        """Accepts no more connections and waits for the requests that are being answered."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        while self.active and time.monotonic() < deadline:
            time.sleep(0.05)


class HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
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
        if self.path != f"/{NAME}/ready":
            self.reply(404, err_msg=USAGE)
        elif self.server.servicer.ready() and not self.server.stopping:
            self.reply(200, 0)
        else:
            self.reply(503, NOT_READY)

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
            rest = min(int(length), MAX_DISCARDED)  # most clients read the answer only after that
            while rest > 0 and (part := self.rfile.read(min(rest, 1 << 16))):
                rest -= len(part)
            return self.reply(413, err_msg=f"the body has {length} bytes; at most {most}")
        body = self.rfile.read(int(length))
        if self.path != f"/{NAME}/prediction":
            return self.reply(404, err_msg=USAGE)
        if len(body) < int(length):
            self.close_connection = True  # the client has gone
            return None
        try:
            content = json.loads(body.decode("utf-8"))
            if not isinstance(content, dict):
                raise TypeError("not an object")
            key, value = content.get("key", []), content.get("value", [])
            if not isinstance(key, list) or not isinstance(value, list):
                raise TypeError("key and value must be lists")
            request = self.server.servicer.Request(key=key, value=value)
        except (ValueError, TypeError, RecursionError) as error:
            return self.reply(400, err_msg=f"the body is not a request in UTF-8 JSON: {error}")
        if "tensors" in content:
            return self.reply(400, err_msg="tensors are not accepted")
        if self.server.stopping:
            return self.reply(503, NOT_READY, "the server is stopping")
        answer = self.server.servicer.inference(request, None)
        status = {0: 200, BAD_REQUEST: 400, BUSY: 429}.get(answer.err_no, 500)
        self.reply(status, answer.err_no, answer.err_msg, answer.key, answer.value)
