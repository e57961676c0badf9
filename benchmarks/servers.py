"""Starts the servers of deploy/ on free ports of this machine, as their READMEs say, and asks them.

    with Running("triton", "export/float32", folder, with_proxy=False) as server:
        ask = CLIENTS["triton_grpc"](server)
        [(label names, scores)] = ask(["婚后生育一子。"])

Triton comes from the package nvidia-pytriton, its proxy is nginx.
"""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import common

from utils import UserError

DEPLOY = common.REPO / "deploy"
KINDS = ("simple_serving", "triton", "paddle_serving", "paddle_engine")
HOST = "127.0.0.1"
PATIENCE = 120  # seconds; a server that is not ready by then has failed


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


class Running:
    """A server with the model of a bundle, as a context; it is ready when the block begins.

    kind: of KINDS; device: of simple_serving. folder: for its files and log.txt. ports: a dict,
    "http" always, "grpc" where the server speaks it, "proxy" of Triton behind nginx. Raises
    UserError if it does not start.
    """

    def __init__(self, kind, prefix, folder, with_proxy=False, device="cpu"):
        self.kind, self.prefix, self.folder = kind, Path(prefix).resolve(), Path(folder)
        self.with_proxy, self.device, self.processes = with_proxy, device, []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.ports = dict(zip(("http", "grpc", "proxy"), free_ports(3)))

    def __enter__(self):
        try:
            getattr(self, f"start_{self.kind}")()
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Ends the server as a user would; returns the exit status of the server itself."""
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        return self.processes[0].wait() if self.processes else None

    @property
    def pid(self):
        return self.processes[0].pid

    def start(self, *command):
        with open(self.log, "ab") as log:
            self.processes.append(
                subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=self.folder)
            )

    def start_simple_serving(self):
        script = DEPLOY / "simple_serving" / "server.py"
        flags = {"model_path_prefix": self.prefix, "port": self.ports["http"]}
        flags = common.argv(**flags, device=self.device)
        self.start(sys.executable, script, *flags)

    def start_triton(self):
        scripts, repository = DEPLOY / "triton_serving", self.folder / "model_repository"
        flags = {"model_path_prefix": self.prefix, "output_dir": repository, "device": "cpu"}
        common.run(scripts / "make_repository.py", log=self.log, **flags)
        flags = {f"{name}_port": self.ports[name] for name in ("http", "grpc")}
        flags |= {"model_repository": repository, "metrics_port": 0}
        self.start(sys.executable, scripts / "local_server.py", *common.argv(**flags))
        if self.with_proxy:
            self.start_nginx((scripts / "nginx.conf").read_text(encoding="utf-8"))

    def start_nginx(self, text):
        nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/bin:/usr/bin")
        if nginx is None:
            raise UserError("nginx is not installed; apt-get install nginx-light")
        (inner,), path = free_ports(1), self.folder / "nginx.conf"
        for old, new in (
            ("listen 8080;", f"listen {HOST}:{self.ports['proxy']};"),
            ("127.0.0.1:8081", f"{HOST}:{inner}"),
            ("127.0.0.1:8000", f"{HOST}:{self.ports['http']}"),
            ("/tmp/nginx_seqcls", f"{self.folder}/nginx_seqcls"),
        ):
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        self.start(nginx, "-p", self.folder, "-c", path, "-e", "stderr", "-g", "daemon off;")

    def start_paddle_engine(self):
        self.start_paddle_serving("paddle")

    def start_paddle_serving(self, engine="auto"):
        import yaml

        scripts = DEPLOY / "paddle_serving"
        flags = {"dirname": self.prefix.parent, "serving_server": self.folder / "serving_server"}
        flags["serving_client"] = self.folder / "serving_client"
        common.run(scripts / "convert.py", log=self.log, **flags)
        config = yaml.safe_load((scripts / "config.yml").read_text(encoding="utf-8"))
        config |= {"http_host": HOST, "http_port": self.ports["http"]}
        config |= {"rpc_host": HOST, "rpc_port": self.ports["grpc"]}
        config["op"]["seq_cls"]["engine"] = engine
        path = self.folder / "config.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.start(sys.executable, scripts / "service.py", f"--config={path}")

    def wait_until_ready(self):
        end = time.monotonic() + PATIENCE
        while not self.ready():
            if time.monotonic() > end or any(p.poll() is not None for p in self.processes):
                lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                raise UserError(f"{self.kind} is not ready: " + "\n".join(lines[-10:]))
            time.sleep(0.1)

    def ready(self, timeout=5):
        """Whether the health check answers 200, through the proxy if there is one."""
        paths = {"simple_serving": "/health/ready", "triton": "/v2/health/ready"}
        path = paths.get(self.kind, "/seq_cls/ready")
        port = self.ports["proxy" if self.with_proxy else "http"]
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
            with contextlib.closing(connection):
                connection.request("GET", path)
                return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


# ------------------------------------------------------------------------------------- clients
# Each takes a Running and gives a function: texts -> [(label names, scores)]. One connection, which
# is kept: each thread needs its own.
def json_client(server, path, request, answers, port="http"):
    connection = http.client.HTTPConnection(HOST, server.ports[port], timeout=60)
    headers = {"Content-Type": "application/json"}

    def ask(texts):
        body = json.dumps(request(texts), ensure_ascii=False).encode()
        connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != 200:
            raise OSError(f"HTTP status {reply.status}: {text[:200]!r}")
        return answers(json.loads(text), len(texts))

    return ask


def simple_serving(server):
    def answers(reply, _):
        pairs = [[(x["label"], x["score"]) for x in r["labels"]] for r in reply["results"]]
        return [([n for n, _ in row], [s for _, s in row]) for row in pairs]

    return json_client(server, "/predict", lambda texts: {"texts": texts}, answers)


def paddle_serving_http(server):
    from http_client import unpack

    def request(texts):
        return {"key": ["sentence"], "value": [json.dumps(texts, ensure_ascii=False)]}

    def answers(reply, count):
        return unpack(*(reply[name] for name in ("err_no", "err_msg", "key", "value")), count)

    return json_client(server, "/seq_cls/prediction", request, answers)


def paddle_serving_grpc(server):
    import grpc
    import rpc_client

    # A pool of its own: channels to the same address would share one connection.
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(f"{HOST}:{server.ports['grpc']}", options)
    types = rpc_client.Request.SerializeToString, rpc_client.Response.FromString
    call = channel.unary_unary(rpc_client.METHOD, *types)

    def ask(texts):
        value = json.dumps(texts, ensure_ascii=False)
        request = rpc_client.Request(key=["sentence"], value=[value], name="seq_cls")
        reply = call(request, timeout=60)
        return rpc_client.unpack(reply.err_no, reply.err_msg, reply.key, reply.value, len(texts))

    return ask


def triton(server, port, protocol="http"):
    from seqcls_grpc_client import Client

    return Client(f"{HOST}:{server.ports[port]}", protocol).classify


def triton_grpc(server):
    return triton(server, "grpc", "grpc")


def triton_http(server):
    return triton(server, "http")


def triton_proxy(server):
    return triton(server, "proxy")


CLIENTS = {  # name -> (kind of server, function)
    "simple_serving": ("simple_serving", simple_serving),
    "triton_grpc": ("triton", triton_grpc),
    "triton_http": ("triton", triton_http),
    "paddle_serving_grpc": ("paddle_serving", paddle_serving_grpc),
    "paddle_serving_http": ("paddle_serving", paddle_serving_http),
    # Paddle Inference where model.onnx would do.
    "paddle_engine_http": ("paddle_engine", paddle_serving_http),
}


def wrong_answers(answers, expected, info, tolerance=1e-4):
    """How many of the answers differ from (label names, probabilities) of the predictor.

    A label whose probability is within `tolerance` of its threshold may be given or not.
    """
    thresholds = info.thresholds or [0.5] * len(info.labels)
    wrong = 0
    for (names, scores), (wanted, probs) in zip(answers, expected, strict=True):
        of = dict(zip(info.labels, probs.tolist()))
        near = {n for n, t in zip(info.labels, thresholds) if abs(of[n] - t) < tolerance}
        far = any(abs(of.get(n, 9.0) - s) > tolerance for n, s in zip(names, scores))
        wrong += far or bool((set(names) ^ set(wanted)) - near) or len(names) != len(scores)
    return wrong
