"""Run tritonserver so that it drains at SIGTERM and comes back when a model process dies.

    python3 serve.py --model_repository model_repository -- --allow-metrics=false

Alone, Triton 2.51 refuses the remaining steps of requests that are in flight at SIGTERM, and after
the death of a Python model's process it fails every request while it reports ready. Here, at
SIGTERM (or Ctrl-C), the tokenizer refuses what is new, what has passed it is answered, and then the
server is stopped; a server that lost a process is started again. Needs the standard library only.
"""

import argparse
import contextlib
import ctypes
import json
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

STUB = "triton_python_b"  # name of a Python model's process, as the kernel cuts it
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
POLL = 0.2  # seconds
STANDSTILL = 10.0  # seconds without progress after which nothing more is waited for
EXIT_SECONDS = 5  # for the server itself; it waits that long for idle HTTP connections to close


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model_repository", default="model_repository", help="made by make_repository.py")
    add("--address", default="0.0.0.0", help="where HTTP and gRPC listen")
    add("--http_port", type=int, default=8000, help="port of HTTP and of the health checks")
    add("--grpc_port", type=int, default=8001, help="port of gRPC")
    add("--drain_seconds", type=float, default=30.0, help="longest wait for requests at SIGTERM")
    add("--tritonserver", default="tritonserver", help="the program to run")
    add("flags", nargs="*", default=[], help="further flags of tritonserver, after --")
    return parser.parse_args(argv)


def log(message):
    print(f"serve.py: {message}", file=sys.stderr, flush=True)


def die_with_parent():
    """If this script is killed, the server should not go on without it, holding the ports."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check_ports(args):
    """Raises OSError if a port is taken; another server there would be mistaken for this one."""
    for port in (args.http_port, args.grpc_port):
        try:
            socket.create_server((args.address, port)).close()
        except OSError as error:
            raise OSError(
                error.errno, os.strerror(error.errno), f"{args.address}:{port}"
            ) from error


class Server:
    """tritonserver and its model processes, a process group of their own."""

    def __init__(self, args):
        self.folder = Path(tempfile.mkdtemp(prefix="seqcls_"))  # see the tokenizer's model.py
        host = "127.0.0.1" if args.address == "0.0.0.0" else args.address
        self.url = f"http://{host}:{args.http_port}/v2"
        command = [
            args.tritonserver,
            f"--model-repository={args.model_repository}",
            *(f"--http-address={args.address}", f"--http-port={args.http_port}"),
            *(f"--grpc-address={args.address}", f"--grpc-port={args.grpc_port}"),
            f"--exit-timeout-secs={EXIT_SECONDS}",
            *args.flags,
        ]
        environment = {**os.environ, "SEQCLS_DRAIN_DIR": str(self.folder)}
        try:
            self.process = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=die_with_parent
            )
        except OSError:
            shutil.rmtree(self.folder)
            raise
        self.stubs, self.regions = set(), set()  # model processes, shared memory seen so far
        self.was_ready = False

    def get(self, path):
        with DIRECT.open(f"{self.url}/{path}", timeout=5) as reply:
            return reply.read()

    def model_processes(self):
        """{process id of a Python model: name of its shared memory, None if the process died}."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                name, _, fields = path.read_text().partition("(")[2].rpartition(")")
                parent = int(fields.split()[1])
                if name == STUB and parent == self.process.pid:
                    words = path.with_name("cmdline").read_bytes().decode().split("\0")
                    regions = [word for word in words if "_shm_region_" in word]
                    found[int(path.parent.name)] = next(iter(regions), None)  # none of a zombie
        return found

    def broken(self):
        """What is wrong with the server, or None."""
        if self.process.poll() is not None:
            return f"tritonserver ended with status {self.process.returncode}"
        now = self.model_processes()
        self.regions |= set(now.values()) - {None}
        if not self.was_ready:
            try:
                self.get("health/ready")
            except OSError:
                return None
            self.was_ready = True
            log(f"ready; health checks at {self.url}/health/ready")
        self.stubs |= now.keys()
        lost = [pid for pid in self.stubs if now.get(pid) is None]
        return f"process {lost[0]} of a model died" if lost else None

    def counts(self):
        """(requests that passed the tokenizer, how many of them have an answer)."""
        begun = sum(int(path.read_bytes() or 0) for path in self.folder.glob("begun.*"))
        models = json.loads(self.get("models/stats"))["model_stats"]
        stats = {model["name"]: model["inference_stats"] for model in models}
        last = stats["seqcls_postprocess"]
        done = last["success"]["count"] + last["fail"]["count"]
        return begun, done + stats["seqcls_model"]["fail"]["count"]

    def drain(self, seconds):
        """Refuses new requests and waits for the accepted ones; True if all have their answer."""
        if not self.was_ready:
            return True
        (self.folder / "draining").touch()
        end, before, since = time.monotonic() + seconds, None, time.monotonic()
        while time.monotonic() < end:
            time.sleep(POLL)
            if problem := self.broken():
                log(f"{problem} while it was stopping")
                return False
            try:
                begun, done = counts = self.counts()
            except OSError:  # too busy to say
                continue
            if counts != before:
                before, since = counts, time.monotonic()
            # What a client cancelled is never done: a standstill ends the wait, too.
            elif begun == done or time.monotonic() - since > STANDSTILL:
                return True
        log(f"requests were still running {seconds:g} s after the signal")
        return False

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(EXIT_SECONDS + 5)
        except subprocess.TimeoutExpired:
            log("tritonserver does not end; killed")
        self.kill()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in self.regions:  # what dies by force leaves it behind
            Path("/dev/shm", region).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def main(argv=None):
    args = parse_args(argv)
    check_ports(args)
    asked_to_stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked_to_stop.append(number))
    server = Server(args)
    try:
        while not asked_to_stop:
            time.sleep(POLL)
            if (problem := server.broken()) is None:
                continue
            server.kill()
            if not server.was_ready:  # it would fail again
                log(f"{problem} before it was ready; its messages are above")
                return 2
            log(f"{problem}; the server is started again")
            server = Server(args)
        log("stopping: new requests are refused, accepted ones are answered")
        drained = server.drain(args.drain_seconds)
        server.stop()
    finally:
        server.kill()
    return 0 if drained else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
