"""Run tritonserver so that it drains at SIGTERM and comes back when a model process dies.

    python3 serve.py --model_repository model_repository -- --log-verbose=1

Alone, Triton 2.51 refuses the remaining steps of requests that are in flight at SIGTERM, and after
the death of a Python model's process it fails every request while it reports ready. Here, at
SIGTERM or Ctrl-C, the tokenizer refuses what is new, what has passed it is answered, and then the
server is stopped; a server that lost a process is restarted. APIs that a service does not need are
closed. Needs the standard library and supervisor.py, which may lie beside this file.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from supervisor import POLL, Server, check_platform, check_port, keep_running, logger

STUB = "triton_python_b"  # name of a Python model's process, as the kernel cuts it
STANDSTILL = 10.0  # seconds without progress after which nothing more is waited for
LINGER = 1.0  # seconds in which the last answers leave the server
MODELS = ("seqcls", "tokenizer", "seqcls_model", "seqcls_postprocess")
# Through these a client could read or write memory, files and models of the server.
RESTRICTED = "shared-memory,logging,trace,model-repository"
ADMIN_HEADER = "seqcls-admin-key"  # over gRPC: triton-grpc-protocol-seqcls-admin-key


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model_repository", default="model_repository", help="made by make_repository.py")
    add("--address", default="127.0.0.1", help="where HTTP and gRPC listen")
    add("--http_port", type=int, default=8000, help="port of HTTP and of the health checks")
    add("--grpc_port", type=int, default=8001, help="port of gRPC")
    add("--metrics_address", default="127.0.0.1", help="where the Prometheus metrics listen")
    add("--metrics_port", type=int, default=8002, help="port of the metrics; 0: no metrics")
    add("--admin_key", help=f"opens the APIs {RESTRICTED}; None: a random one, so they stay closed")
    add("--drain_seconds", type=float, default=30.0, help="longest wait for requests at SIGTERM")
    add("--tritonserver", default="tritonserver", help="the program to run")
    add("flags", nargs="*", default=[], help="further flags of tritonserver, after --")
    return parser.parse_args(argv)


def main(argv=None):
    return run(parse_args(argv))


def run(args):
    """Serves until SIGTERM or Ctrl-C; returns the exit status. Raises OSError."""
    logging.basicConfig(level=logging.INFO, format="serve.py: %(message)s")
    check_platform()
    check_repository(args.model_repository)
    if args.admin_key is not None and not re.fullmatch(r"[\w-]{16,}", args.admin_key, re.ASCII):
        raise OSError("--admin_key: give at least 16 letters, digits, - or _")
    check_ports(args)
    return keep_running(lambda: TritonServer(args))


def check_repository(path):
    """Triton itself calls an empty folder ready. Raises OSError."""
    if missing := [name for name in MODELS if not Path(path, name, "config.pbtxt").is_file()]:
        raise OSError(
            f"--model_repository {path}: {missing[0]}/config.pbtxt is missing; make the folder "
            "with make_repository.py"
        )


def check_ports(args):
    """Raises OSError if a port is taken or given twice."""
    ports = {"http_port": args.http_port, "grpc_port": args.grpc_port}
    if args.metrics_port:
        ports["metrics_port"] = args.metrics_port
    for name, port in ports.items():
        if twins := [other for other in ports if other != name and ports[other] == port]:
            raise OSError(f"--{name} and --{twins[0]} are both {port}; give different ports")
        check_port(args.metrics_address if name == "metrics_port" else args.address, port)


class TritonServer(Server):
    """tritonserver and its model processes."""

    def __init__(self, args):
        self.drain_seconds = args.drain_seconds
        self.temporary = tempfile.TemporaryDirectory(prefix="seqcls_")
        self.folder = Path(self.temporary.name)  # see the tokenizer's model.py
        self.stubs, self.regions = set(), set()  # model processes, shared memory seen so far
        # A new random key at each start: without --admin_key nobody knows it.
        closed = f"{RESTRICTED}:{ADMIN_HEADER}={args.admin_key or secrets.token_urlsafe()}"
        metrics = ["--allow-metrics=false"]
        if args.metrics_port:
            address, port = args.metrics_address, args.metrics_port
            metrics = [f"--metrics-address={address}", f"--metrics-port={port}"]
        command = [
            args.tritonserver,
            f"--model-repository={args.model_repository}",
            f"--http-address={args.address}",
            f"--http-port={args.http_port}",
            f"--grpc-address={args.address}",
            f"--grpc-port={args.grpc_port}",
            *metrics,
            f"--http-restricted-api={closed}",
            f"--grpc-restricted-protocol={closed}",
            *args.flags,
        ]
        os.environ["SEQCLS_DRAIN_DIR"] = str(self.folder)
        address = args.address, args.http_port
        super().__init__(command, address, "/v2/models/seqcls/ready", args.drain_seconds)

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

    def problem(self):
        if problem := super().problem():
            return problem
        now = self.model_processes()
        self.regions |= set(now.values()) - {None}
        if self.was_ready:
            self.stubs |= now.keys()
        lost = [pid for pid in self.stubs if now.get(pid) is None]
        return f"process {lost[0]} of a model died" if lost else None

    def counts(self):
        """(requests that passed the tokenizer, how many of them have an answer)."""
        begun = sum(int(path.read_bytes() or 0) for path in self.folder.glob("begun.*"))
        models = json.loads(self.get("/v2/models/stats"))["model_stats"]
        stats = {model["name"]: model["inference_stats"] for model in models}
        last = stats["seqcls_postprocess"]
        done = last["success"]["count"] + last["fail"]["count"]
        return begun, done + stats["seqcls_model"]["fail"]["count"]

    def drain(self):
        """Refuses new requests and waits for the accepted ones; True if all have their answer."""
        (self.folder / "draining").touch()
        now = time.monotonic()
        end, before, since = now + self.drain_seconds, None, now
        while time.monotonic() < end:
            time.sleep(POLL)
            if problem := self.problem():
                logger.error("%s while it was stopping", problem)
                return False
            try:
                begun, done = counts = self.counts()
            except OSError:  # too busy to say
                continue
            if counts != before:
                before, since = counts, time.monotonic()
            # What a client cancelled is never done: a standstill ends the wait, too.
            elif begun == done or time.monotonic() - since > STANDSTILL:
                time.sleep(LINGER)
                return True
        logger.error("requests were still running %g s after the signal", self.drain_seconds)
        return False

    def stop(self):
        """Answers what was accepted; the rest is done by kill().

        At SIGTERM Triton 2.51 would unload the models first and tell clients that keep their
        connection NOT_FOUND; of a killed server they lose the connection, which is UNAVAILABLE.
        """
        return self.drain() if self.was_ready else True

    def kill(self):
        super().kill()
        for region in self.regions:  # what dies by force leaves it behind
            Path("/dev/shm", region).unlink(missing_ok=True)
        self.temporary.cleanup()


def cli(main):
    """Runs main(); an error of the user is one line and exit status 2."""
    try:
        sys.exit(main())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli(main)
