"""An ASGI app on the open network: uvicorn with deadlines, limits, request ids and a clean stop.

    front = Front(app, Limits(max_body_bytes=1 << 20), health=("/health/live", "/health/ready"))
    sys.exit(front.run("127.0.0.1", 8000))

What uvicorn leaves to a proxy: clients that send or read slowly, heads and bodies without an end,
more connections than can be served, and keep-alive clients while the server stops. Shared by
simple_serving/server.py and paddle_serving/service.py. What the app finds in its scope:

    scope["front"]         the Front; .stopping is what a readiness check must look at
    scope["request_id"]    of the client or new; the answer carries it already
    scope["access"]        a dict; what the app puts there appears in the access line
    scope["gone"]()        True once the client has left, so that its request can be dropped

The app gets a whole body in one message, and HEAD as GET. It answers all paths and methods itself.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone

import uvicorn
from http_protocol import CLOSE, RESERVE, STOPPING, Protocol, json_headers, request_id_of

GONE = 499  # in access lines only: the client left before the answer
logger = logging.getLogger("multi_label")


@dataclass(frozen=True)
class Limits:
    """What a client may take; seconds and bytes."""

    max_body_bytes: int = 1 << 20
    max_connections: int = 512  # for more, a slow or an idle one goes; see make_room
    receive_seconds: float = 10.0  # for head and body together, and to read the answer
    patience_seconds: float = 1.0  # the same while there are too many connections
    idle_seconds: float = 60.0  # of a keep-alive connection
    grace_seconds: float = 1.0  # after SIGTERM, in which keep-alive clients learn of it
    drain_seconds: float = 30.0  # after that, to answer what was accepted


async def send_json(send, status, value, headers=()):
    """Sends a whole JSON answer. headers: pairs of bytes."""
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    headers = [*json_headers(body), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(send, status, message, headers=()):
    await send_json(send, status, {"error": message}, headers)


class Front:
    """The app with all that surrounds it.

    health: paths that are answered even if there are too many connections. on_answer: called with
    the dict of every access line, also of requests that never reached the app. access_log: whether
    these lines are written to stderr. stopping: True after SIGTERM or Ctrl-C; where `run` is not in
    the main thread, setting it does what they do.
    """

    def __init__(self, app, limits=None, health=(), on_answer=None, access_log=True):
        self.app, self.limits, self.health = app, limits or Limits(), health
        self.on_answer, self.access_log = on_answer, access_log
        self.stopping, self.unanswered, self.lines = False, 0, []
        self.reserve = {}  # connections above the limit, the oldest first
        self.receiving = {}  # connections whose request is not whole yet, the oldest first
        self.idle = {}  # keep-alive connections between two requests, the oldest first

    def run(self, host, port):
        """Serves until SIGTERM or Ctrl-C. Returns the exit status: 0, or 1 if an accepted request
        was not answered within drain_seconds. Raises OSError if the address can't be had."""
        listener = listen(host, port)
        _allow_files(self.limits.max_connections + RESERVE + 128)
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # access lines tell of each fault
        config = uvicorn.Config(
            self,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=self.limits.idle_seconds,
            timeout_graceful_shutdown=self.limits.drain_seconds,
        )
        server = _Server(config)
        name = f"[{host}]" if ":" in host else host
        logger.info("listening on http://%s:%d", name, listener.getsockname()[1])
        server.run(sockets=[listener])
        self.write_lines()
        return 1 if self.unanswered or not server.started else 0

    def make_room(self, now):
        """Closes the connection that is slowest to send its request, else the one that has asked
        nothing for longest. Returns whether there was one."""
        slowest, oldest = (next(iter(group), None) for group in (self.receiving, self.idle))
        if slowest and now - slowest.start > self.limits.patience_seconds:
            slowest.give_way()
        elif oldest:
            del self.idle[oldest]
            oldest.timeout_keep_alive_handler()
        else:
            return False
        return True

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, access, status, body = time.perf_counter(), {}, None, None
        request_id = request_id_of(scope["headers"])
        head = [(b"x-request-id", request_id.encode())]

        async def send_head(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [*head, CLOSE] if self.stopping else head
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            body = await _whole_body(receive)
            if body is None:  # the client has gone, or the protocol has refused the rest
                return
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            more = {"front": self, "request_id": request_id, "access": access, "method": method}
            await self.app({**scope, **more}, _replay(body, receive), send_head)
        except asyncio.CancelledError:  # drain_seconds are over
            self.unanswered += body is not None
            if status is None:
                await send_error(send_head, 503, STOPPING)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status is not None:
                raise  # uvicorn closes the connection
            await send_error(send_head, 500, "internal error; the server's log has the reason")
        finally:
            if "refused" not in scope:  # which has a line of its own
                self.log(scope, request_id, status or GONE, start, access)

    def log(self, scope, request_id, status, start, access):
        """One JSON line to stderr; never the query, which might hold a text."""
        client = scope.get("client")
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": client[0] if client else None,
            "method": scope.get("method"),
            "path": scope.get("path", "")[:200],
            "status": status,
            "ms": round(1000 * (time.perf_counter() - start), 2),
            **access,
        }
        if self.on_answer:
            self.on_answer(record)
        if self.access_log:
            if not self.lines:  # answers of the same moment share one write
                asyncio.get_running_loop().call_soon(self.write_lines)
            self.lines.append(json.dumps(record) + "\n")

    def write_lines(self):
        lines, self.lines = "".join(self.lines), []
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
            sys.stderr.write(lines)
            sys.stderr.flush()


async def _whole_body(receive):
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


def _replay(body, receive):
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again():
        return messages.pop() if messages else await receive()

    return receive_again


class _Server(uvicorn.Server):
    """Goes on for grace_seconds after a signal, and leaves the exit status to its caller."""

    stop_at = None

    def handle_exit(self, number, frame):
        if self.config.app.stopping and number == signal.SIGINT:  # a second Ctrl-C
            self.force_exit = self.should_exit = True
        self.config.app.stopping = True

    async def on_tick(self, counter):
        front = self.config.app
        if front.stopping and self.stop_at is None:
            logger.info("stopping: accepted requests are answered")
            self.stop_at = time.monotonic() + front.limits.grace_seconds
        grace_is_over = self.stop_at is not None and time.monotonic() >= self.stop_at
        return await super().on_tick(counter) or grace_is_over


def listen(host, port):
    """A socket that listens; raises OSError that names the address."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error


def _allow_files(number):
    """Every connection is an open file; many systems allow 256 or 1024 unless asked."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        number = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
