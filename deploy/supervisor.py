"""Keep a server running: start it, restart it when it is lost, stop it on SIGTERM or Ctrl-C.

Shared by paddle_serving/service.py and triton_serving/serve.py. Needs the standard library only, as
Triton's image has nothing else.
"""

import contextlib
import ctypes
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

POLL = 0.2  # seconds
MAX_FAILED_STARTS = 3  # in a row; then keep_running gives up
# Reads until the supervisor is gone, however it ended, then kills the server's process group.
WATCHER = "trap '' HUP INT TERM; read _; kill -KILL -$0"
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores http_proxy
logger = logging.getLogger("multi_label")


def check_platform():
    """Raises OSError where the functions are missing that stop a server with all its processes."""
    if sys.platform != "linux" or not hasattr(os, "killpg"):
        raise OSError("this server needs Linux; on Windows use WSL or Docker, or deploy/predictor")


def check_port(host, port):
    """Raises OSError if no server can listen there.

    Another server at that address would be mistaken for ours.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except (OSError, OverflowError, TypeError) as error:
            reason = getattr(error, "strerror", error)
            raise OSError(f"cannot listen on {host}:{port}: {reason}") from error


def die_with_parent():
    """A server must not outlive a killed supervisor and hold its ports.

    This reaches the server alone, but at once; the watcher below ends whatever it has started.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """A server process, alone in a session, so that whatever it starts can be killed with it.

    address: (host, port) of its HTTP. health: the path that answers 200 once the server is ready.
    """

    def __init__(self, command, address, health, stop_seconds):
        host, port = address
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        self.health, self.stop_seconds, self.was_ready = health, stop_seconds, False
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
        self.watcher = subprocess.Popen(
            ["sh", "-c", WATCHER, str(self.process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def get(self, path):
        """The body of a reply with status 200; raises OSError for anything else."""
        try:
            with DIRECT.open(self.url + path, timeout=5) as reply:
                return reply.read()
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP reply: {error!r}") from error

    def problem(self):
        """Why the server has to be replaced, or None."""
        if self.process.poll() is not None:
            return f"the server ended with exit status {self.process.returncode}"
        if not self.was_ready:
            with contextlib.suppress(OSError):
                self.get(self.health)
                self.was_ready = True
                logger.info("ready; health check: %s", self.url + self.health)
        return None

    def stop(self):
        """Asks the server to end; False if it did not in time, or says that it left some
        requests unanswered."""
        self.process.terminate()
        try:
            self.process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            logger.error("the server did not stop within %g s; killing it", self.stop_seconds)
            return False
        return self.process.returncode == 0 or not self.was_ready

    def kill(self):
        """Ends the server and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.watcher.communicate()  # ends it; before the group's number is free for others
        self.process.wait()


def keep_running(start, max_failed_starts=MAX_FAILED_STARTS):
    """Runs the Server that start() returns, until SIGTERM or SIGINT. Returns the exit status.

    0: stopped; 1: not everything was answered; 2: the server fails whenever it is started.
    """
    signals, failed_starts = [], 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    server = start()
    try:
        while not signals:
            time.sleep(POLL)
            problem = server.problem()
            if problem is None:
                continue
            server.kill()
            failed_starts = 0 if server.was_ready else failed_starts + 1
            if failed_starts and server.process.returncode == 2:
                return 2  # a mistake of the user, which the server has explained
            if failed_starts == max_failed_starts:
                logger.error("%s before it was ready; see its messages above", problem)
                return 2
            logger.error("%s; restarting it", problem)
            server = start()
        logger.info("stopping: new requests are refused, accepted ones are answered")
        return 0 if server.stop() else 1
    finally:
        server.kill()
