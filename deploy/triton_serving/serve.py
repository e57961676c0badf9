"""Run tritonserver so that it drains at SIGTERM and comes back when a model process dies.

    python3 serve.py --model_repository model_repository -- --allow-metrics=false

Alone, Triton 2.51 refuses the remaining steps of requests that are in flight at SIGTERM, and after
the death of a Python model's process it fails every request while it reports ready. Here, at
SIGTERM or Ctrl-C, the tokenizer refuses what is new, what has passed it is answered, and then the
server is stopped; a server that lost a process is restarted. Needs the standard library and
supervisor.py, which may lie beside this file.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from supervisor import POLL, Server, check_platform, check_port, keep_running, logger

STUB = "triton_python_b"  # name of a Python model's process, as the kernel cuts it
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


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="serve.py: %(message)s")
    check_platform()
    for port in (args.http_port, args.grpc_port):
        check_port(args.address, port)
    return keep_running(lambda: TritonServer(args), max_failed_starts=1)


class TritonServer(Server):
    """tritonserver and its model processes."""

    def __init__(self, args):
        self.drain_seconds = args.drain_seconds
        self.temporary = tempfile.TemporaryDirectory(prefix="seqcls_")
        self.folder = Path(self.temporary.name)  # see the tokenizer's model.py
        self.stubs, self.regions = set(), set()  # model processes, shared memory seen so far
        command = [
            args.tritonserver,
            f"--model-repository={args.model_repository}",
            f"--http-address={args.address}",
            f"--http-port={args.http_port}",
            f"--grpc-address={args.address}",
            f"--grpc-port={args.grpc_port}",
            f"--exit-timeout-secs={EXIT_SECONDS}",
            *args.flags,
        ]
        os.environ["SEQCLS_DRAIN_DIR"] = str(self.folder)
        address = args.address, args.http_port
        super().__init__(command, address, "/v2/health/ready", EXIT_SECONDS + 5)

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
                return True
        logger.error("requests were still running %g s after the signal", self.drain_seconds)
        return False

    def stop(self):
        drained = self.drain() if self.was_ready else True
        super().stop()
        return drained

    def kill(self):
        super().kill()
        for region in self.regions:  # what dies by force leaves it behind
            Path("/dev/shm", region).unlink(missing_ok=True)
        self.temporary.cleanup()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
