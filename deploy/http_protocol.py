"""A connection of http_server.py: uvicorn's own, with deadlines, size limits and JSON errors."""

import json
import random
import re
import time
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 1 << 16  # bytes of a request's head, or of the framing of a chunked body
MAX_DROPPED = 1 << 24  # bytes read from a client that was refused, so that it reads the answer
RESERVE = 64  # connections above max_connections: health checks, and those that are told to go
RESERVE_SECONDS = 2.0  # to send a request there
REQUEST_ID = re.compile(rb"[ -~]{1,128}")
CLOSE = (b"connection", b"close")
TOO_MANY = "too many connections; retry later"
STOPPING = "the server is stopping; retry later"


class Refusal(Exception):
    """Arguments: the status and the reason of an answer that needs no app."""


def request_id_of(headers):
    """The client's X-Request-ID if it is short and printable, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value.decode()
    return f"{random.getrandbits(64):016x}"


def json_headers(body):
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]


class Protocol(HttpToolsProtocol):
    """One timer watches a connection: a request must be whole, and an answer read, in time.

    Answers keep their order: the refusal of what follows an accepted request waits for its answer.
    """

    timer = refusal = None
    received = body_bytes = dropped = 0  # bytes
    pending = 0  # whole requests without an answer
    receiving = has_head = False  # a request is not whole yet; its head is
    start = 0.0

    @property
    def front(self):
        return self.config.app

    def watch(self, callback, seconds=None):
        """Calls back after receive_seconds unless called again; callback None: never."""
        if self.timer:
            self.timer.cancel()
            self.timer = None
        if callback:
            seconds = seconds or self.front.limits.receive_seconds
            self.timer = self.loop.call_later(seconds, callback)

    def connection_made(self, transport):
        super().connection_made(transport)
        reserve, limits = self.front.reserve, self.front.limits
        full = len(self.connections) - len(reserve) > limits.max_connections
        self.start = time.perf_counter()
        if not full or self.front.make_room(self.start):
            return self.await_request()
        reserve[self] = True
        self.watch(self.too_slow, min(limits.receive_seconds, RESERVE_SECONDS))
        if len(reserve) > RESERVE:
            next(iter(reserve)).give_way()

    def await_request(self):
        self.start = time.perf_counter()
        self.front.receiving[self] = True
        self.watch(self.too_slow)

    def connection_lost(self, exc):
        self.watch(None)
        for group in (self.front.reserve, self.front.idle, self.front.receiving):
            group.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data):
        if self.refusal:
            self.dropped += len(data)
            if self.dropped > MAX_DROPPED:
                self.transport.abort()
            return
        if self.timeout_keep_alive_task:
            self.timeout_keep_alive_task.cancel()
        self.front.idle.pop(self, None)
        if not self.timer and not self.pending:
            self.await_request()
        self.received += len(data)
        try:
            while data:
                data = self.parse(data)
            self.check_size()
        except Refusal as error:
            self.refuse(*error.args)
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback has raised
            reason = (400, f"not a valid HTTP request ({error})")
            self.refuse(*(cause.args if isinstance(cause, Refusal) else reason))

    def parse(self, data):
        """Returns what follows a wish for another protocol, which is not granted."""
        try:
            self.parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as upgrade:
            return data[upgrade.args[0] :]

    def check_size(self):
        most = self.front.limits.max_body_bytes
        if not self.receiving:
            self.received = 0
        elif not self.has_head and self.received > MAX_HEAD:
            raise Refusal(431, f"the head has more than {MAX_HEAD} bytes")
        elif self.received > MAX_HEAD + 2 * most:
            raise Refusal(413, "the body has too many small chunks; send Content-Length")

    # ------------------------------------------------ the parser's callbacks; they raise Refusal
    def on_message_begin(self):
        super().on_message_begin()
        self.scope["gone"] = self.transport.is_closing
        self.receiving, self.has_head, self.body_bytes = True, False, 0
        if not self.timer:  # it follows another one whose answer is not there yet
            self.watch(self.too_slow)

    def on_headers_complete(self):
        super().on_headers_complete()
        self.has_head = True
        reserve, limits = self.front.reserve, self.front.limits
        if self in reserve:
            if self.scope["path"] in self.front.health:
                self.cycle.keep_alive = False
            elif len(self.connections) - len(reserve) < limits.max_connections:
                del reserve[self]
            else:
                raise Refusal(503, TOO_MANY)
        for name, value in self.headers:
            if name == b"content-length":
                self.check_body(int(value))

    def check_body(self, size):
        most = self.front.limits.max_body_bytes
        if size > most:
            raise Refusal(413, f"the body has more than {most} bytes")

    def on_body(self, body):
        self.body_bytes += len(body)
        self.check_body(self.body_bytes)
        super().on_body(body)

    def on_message_complete(self):
        self.receiving = False
        self.front.receiving.pop(self, None)
        self.pending += 1
        self.watch(None)
        super().on_message_complete()

    def on_response_complete(self):
        self.pending -= 1
        super().on_response_complete()
        if self.transport.is_closing():
            self.watch(self.transport.abort)
        elif self.refusal and not self.pending:
            self.answer_refusal()
        elif not self.pending and not self.receiving:
            self.front.idle[self] = True

    # --------------------------------------------------------------------------- slow clients
    def too_slow(self):
        if self in self.front.reserve:
            self.refuse(503, TOO_MANY)
        elif self.flow.read_paused:  # by us
            self.watch(self.too_slow)
        elif self.receiving:
            seconds = self.front.limits.receive_seconds
            self.refuse(408, f"the request was not complete within {seconds:g} s")
        else:
            self.transport.close()

    def pause_writing(self):
        super().pause_writing()
        self.watch(self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.watch(self.too_slow if self.receiving else None)

    def timeout_keep_alive_handler(self):
        super().timeout_keep_alive_handler()
        self.watch(self.transport.abort)

    # -------------------------------------------------------------------- answers without the app
    def refuse(self, status, reason):
        """Answers and closes, once the accepted requests before have their answers."""
        if self.refusal:
            return
        self.refusal = status, reason
        self.front.receiving.pop(self, None)
        self.watch(None)
        if self.receiving and self.has_head:  # for the app the client has left
            self.scope["refused"] = True
            self.cycle.waiting_for_100_continue = False
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
            else:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        if not self.pending:
            self.answer_refusal()

    def answer_refusal(self):
        status, reason = self.refusal
        scope = self.scope if self.receiving else {}
        request_id = request_id_of(scope.get("headers", ()))
        body = json.dumps({"error": reason}).encode()
        headers = [*self.server_state.default_headers, *json_headers(body), CLOSE]
        headers.append((b"x-request-id", request_id.encode()))
        lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
        lines += [b"%s: %s" % header for header in headers]
        lines += [b"", b"" if scope.get("method") == "HEAD" else body]
        self.transport.write(b"\r\n".join(lines))
        self.front.log(scope, request_id, status, self.start, {"error": reason})
        # A connection that is closed with data unread is reset, and the answer with it.
        self.flow.resume_reading()
        self.transport.write_eof()
        self.watch(self.transport.abort)

    def give_way(self):
        """Closes at once, for a newer connection."""
        self.front.reserve.pop(self, None)
        self.refuse(503, TOO_MANY)
        self.transport.close()

    def shutdown(self):
        """Called when the grace after SIGTERM is over."""
        if self.receiving and not self.has_head:
            self.refuse(503, STOPPING)
        else:
            super().shutdown()
