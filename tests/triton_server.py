"""Starts a real tritonserver (PyPI package nvidia-pytriton) on free ports of this machine only.

with TritonServer(model_repository) as server:
    ...  # server.grpc_url, server.http_url
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PATIENCE = 300  # seconds; a test that waits longer has failed, however busy the machine is
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
REPO = Path(__file__).resolve().parent.parent
LOCAL_SERVER = REPO / "deploy" / "triton_serving" / "local_server.py"


def free_ports(count):
    """Port numbers that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def wait_until(condition, what):
    """The first true value of condition(); fails with what(), e.g. a log, if there is none."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, what()
        time.sleep(0.05)
    return value


class TritonServer:
    """A running server, started by deploy/triton_serving/local_server.py as a user does.

    flags: more flags of serve.py. Raises RuntimeError with the log's end if it doesn't start.
    """

    def __init__(self, repository, flags=()):
        self.folder = Path(tempfile.mkdtemp(prefix="triton_"))
        self.log_file = self.folder / "log.txt"
        http_port, grpc_port = free_ports(2)
        self.http_url, self.grpc_url = f"127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
        command = [sys.executable, LOCAL_SERVER, "--model_repository", repository]
        command += ["--http_port", http_port, "--grpc_port", grpc_port, "--metrics_port", 0, *flags]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=log,
                # Its temporary folders come to ours, by which processes() finds what it started.
                env={**os.environ, "TMPDIR": str(self.folder)},
                cwd=REPO,  # whose model.py must not be taken for a backend
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def ready(self):
        """What /v2/health/ready says; False also if nobody answers."""
        try:
            with DIRECT.open(f"http://{self.http_url}/v2/health/ready", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def _wait_until_ready(self):
        def started():
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver did not start:\n{self.log()[-4000:]}")
            return self.ready() and "serve.py: ready" in self.log()

        wait_until(started, self.log)

    def log(self):
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def processes(self):
        """{pid: command line} of serve.py, the server and the model processes."""
        table = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state = stat.read_text().rpartition(")")[2].split()[0]
                command = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended meanwhile
                continue
            if state != "Z":
                table[int(stat.parent.name)] = command
        # Whoever was started from the temporary folder belongs to it, also if its parent is gone.
        return {p: c for p, c in table.items() if p == self.process.pid or str(self.folder) in c}

    def stop(self, number=signal.SIGTERM):
        """Sends the signal; returns the exit status. Raises subprocess.TimeoutExpired."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def kill(self):
        """Ends whatever is left and removes the temporary files."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.stop()
        finally:
            self.kill()


class Proxy:
    """The real nginx with deploy/triton_serving/nginx.conf in front of a server, on free ports.

    A foreground process with a folder of its own. Raises RuntimeError if it doesn't start.
    """

    def __init__(self, program, triton_url):
        port, inner_port = free_ports(2)
        self.url = f"127.0.0.1:{port}"
        self.folder = Path(tempfile.mkdtemp(prefix="nginx_"))
        text = (REPO / "deploy" / "triton_serving" / "nginx.conf").read_text(encoding="utf-8")
        for old, new in (
            ("server 127.0.0.1:8000;", f"server {triton_url};"),
            ("listen 8080;", f"listen {self.url};"),
            ("127.0.0.1:8081", f"127.0.0.1:{inner_port}"),
            ("/tmp/", f"{self.folder}/"),
            ("/dev/stderr", f"{self.folder}/access.log"),
        ):
            assert old in text, old
            text = text.replace(old, new)
        (self.folder / "nginx.conf").write_text(text, encoding="utf-8")
        command = [program, "-p", self.folder, "-c", self.folder / "nginx.conf"]
        self.log_file = self.folder / "log.txt"
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=log)
        try:
            wait_until(self._listens, self.log)
        except BaseException:
            self.stop()
            raise

    def _listens(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"nginx did not start:\n{self.log()}")
        try:
            socket.create_connection(("127.0.0.1", int(self.url.split(":")[1]))).close()
        except OSError:
            return False
        return True

    def log(self):
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
