"""The container files of the three servers: linted, of one mind, and the images' commands run.

There is no Docker engine here. hadolint and kubernetes-validate (requirements-dev.txt) know the
formats; what an image would hold is put together from its COPY lines, and its CMD runs there with
the container's folders in a temporary one.
"""

import contextlib
import fnmatch
import functools
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import convert
import make_repository
import predictor
import pytest
import yaml
from conftest import REPO, needs_package
from triton_server import PATIENCE, free_ports, wait_until

DEPLOY = REPO / "deploy"
PORTS = {  # of the servers; others see those of Triton's proxy
    "simple_serving": {"http": 8000},
    "paddle_serving": {"http": 9878, "grpc": 18090},
    "triton_serving": {"http": 8000, "grpc": 8001},
}
PACKAGES = {  # without which a server does not run here
    "simple_serving": "fastapi",
    "paddle_serving": "paddle_serving_server",
    "triton_serving": "pytriton",
}
PROXY_PORT = 8080  # of triton_serving/nginx.conf
BASES = {"python:3.12-slim-bookworm", "nvcr.io/nvidia/tritonserver:26.07-py3"}
TEXT = "一、判决原告于某某与被告杨某某离婚；"


def tool(name):
    """The path of a program; the test is skipped without it."""
    folders = [str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]
    folders = os.pathsep.join(folders)
    if path := shutil.which(name, path=folders):
        return path
    if os.environ.get("REQUIRE_SHARED"):
        pytest.fail(f"REQUIRE_SHARED is set and {name} is not installed")
    pytest.skip(f"{name} is not installed")


class Files:
    """Dockerfile, compose.yaml and kubernetes.yaml of a server."""

    def __init__(self, name):
        self.name, self.folder = name, DEPLOY / name
        text = (self.folder / "Dockerfile").read_text(encoding="utf-8")
        lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
        self.docker = [tuple(line.split(maxsplit=1)) for line in lines if line]
        self.compose = yaml.safe_load((self.folder / "compose.yaml").read_text(encoding="utf-8"))
        manifests = yaml.safe_load_all(
            (self.folder / "kubernetes.yaml").read_text(encoding="utf-8")
        )
        self.deployment, self.service = manifests
        self.pod = self.deployment["spec"]["template"]["spec"]
        self.server = self.compose["services"]["server"]
        self.container = self.pod["containers"][0]

    def lines(self, instruction):
        return [rest for name, rest in self.docker if name == instruction]

    def probes(self):
        """Kubernetes' probes."""
        names = ("startupProbe", "readinessProbe", "livenessProbe")
        return [each[name] for each in self.pod["containers"] for name in names if name in each]

    def check_commands(self):
        """The commands that Compose and Kubernetes run to see whether the server is well."""
        commands = [probe["exec"]["command"] for probe in self.probes() if "exec" in probe]
        return [*commands, self.server["healthcheck"]["test"][1:]]

    def check_paths(self):
        paths = {probe["httpGet"]["path"] for probe in self.probes() if "httpGet" in probe}
        return paths | {re.search("'GET', '([^']+)'", c[-1])[1] for c in self.check_commands()}


@pytest.fixture(params=PORTS)
def files(request):
    return Files(request.param)


# ------------------------------------------------------------------------------------------ lint
@pytest.mark.parametrize(
    "command", [["hadolint", "Dockerfile"], ["kubernetes-validate", "--strict", "kubernetes.yaml"]]
)
def test_linters(files, command):
    command = [tool(command[0]), *command[1:]]
    run = subprocess.run(command, cwd=files.folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_dockerfile(files):
    """What hadolint does not ask for."""
    (base,) = files.lines("FROM")
    assert base in BASES
    assert not files.lines("ADD") and len(files.lines("CMD")) == 1
    json.loads(files.lines("CMD")[0])  # no shell, so that SIGTERM reaches the server
    text = (files.folder / "Dockerfile").read_text(encoding="utf-8")
    assert "://" not in text and not re.search(r"(?i)token|secret|passwd", text)
    assert files.lines("ARG") == ["PIP_INDEX_URL", "PIP_TRUSTED_HOST"]  # a mirror; no default
    assert files.docker.index(("USER", "10001:10001")) > max(
        i for i, (name, _) in enumerate(files.docker) if name == "RUN"
    )


def test_copied_files(files, tmp_path):
    """They are in git, and .dockerignore lets them through; it keeps models and data out."""
    assert all(map(in_context, copied(files)))
    build_image(files, tmp_path)
    for path in (
        "data/train.txt",
        "export/model.onnx",
        ".git/config",
        "deploy/x/__pycache__/a.pyc",
    ):
        assert not in_context(path)
    assert not in_context("deploy/paddle_serving/serving_server/float32.pdiparams")


def in_context(path):
    """Whether .dockerignore sends a file to the build: the last pattern that fits decides."""
    kept = True
    for pattern in (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if pattern and not pattern.startswith("#"):
            name = pattern.removeprefix("!")
            parts = Path(path).parts
            heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            if any(fnmatch.fnmatch(head, name.replace("**/", "*/")) for head in heads):
                kept = pattern.startswith("!")
    return kept


def copied(files):
    """{path in git: path in the image}"""
    folder, found = "/", {}
    for instruction, rest in files.docker:
        if instruction == "WORKDIR":
            folder = os.path.join(folder, rest)
        elif instruction == "COPY":
            *sources, target = shlex.split(rest)
            assert target.endswith("/"), "a file may take the name of a folder that is missing"
            for source in sources:
                paths = [path for path in tracked() if matches(path, source)]
                assert paths, f"{source}: not in git"
                for path in paths:
                    found[path] = os.path.normpath(os.path.join(folder, target, Path(path).name))
    return found


@functools.cache
def tracked():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, stdout=subprocess.PIPE, check=True)
    return run.stdout.decode().split("\0")[:-1]


def matches(path, pattern):
    return fnmatch.fnmatch(path, pattern) and path.count("/") == pattern.count("/")


def build_image(files, root):
    for source, target in copied(files).items():
        path = root / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / source, path)


# ----------------------------------------------------------------------------------- of one mind
def drain_seconds(name):
    """The longest that a server takes to stop, by its own flags or settings, which must let other
    machines in."""
    command = json.loads(Files(name).lines("CMD")[0])
    if name == "paddle_serving":
        config = yaml.safe_load((DEPLOY / name / "config.yml").read_text(encoding="utf-8"))
        assert config["rpc_host"] == config["http_host"] == "0.0.0.0"
        return config["limits"]["drain_seconds"] + 10  # see service.py
    if name == "simple_serving":
        needs_package(PACKAGES[name])  # serve.py needs none
    module, address, seconds = {
        "simple_serving": ("server", "host", "args.grace_seconds + args.drain_seconds"),
        "triton_serving": ("serve", "address", "args.drain_seconds + serve.LINGER"),
    }[name]
    code = f"import sys; sys.path.insert(0, {str(DEPLOY / name)!r}); import {module}; "
    code += f"args = {module}.parse_args(sys.argv[1:]); print(args.{address}, {seconds})"
    run = [sys.executable, "-c", code, *command[2:]]
    run = subprocess.run(run, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr  # as it is if a flag is unknown
    address, seconds = run.stdout.split()
    assert address == "0.0.0.0"
    return float(seconds)


def test_they_agree(files):
    server, container = files.server, files.container
    # Ports.
    exposed = [int(port) for port in files.lines("EXPOSE")[0].split()]
    assert exposed == list(PORTS[files.name].values())
    last = files.pod["containers"][-1]  # the proxy where there is one
    ports = {port["name"]: port["containerPort"] for port in last["ports"]}
    assert ports == ({"http": PROXY_PORT} if last is not container else PORTS[files.name])
    assert {port["targetPort"] for port in files.service["spec"]["ports"]} == set(ports)
    for published in server["ports"]:
        address, _, port = published.split(":")
        assert address == "127.0.0.1" and int(port) in ports.values()
    # Commands.
    commands = [server.get("command"), container.get("command")]
    if last is not container:  # shares the network with the proxy, so Triton need not be seen
        cmd = json.loads(files.lines("CMD")[0].replace("0.0.0.0", "127.0.0.1"))
        assert commands == [cmd, cmd]
        assert last["command"] == files.compose["services"]["proxy"]["entrypoint"]
        assert last["image"] == files.compose["services"]["proxy"]["image"]
    else:
        assert commands == [None, None]
    # Names and labels.
    labels = files.deployment["spec"]["template"]["metadata"]["labels"]
    assert files.deployment["spec"]["selector"]["matchLabels"] == labels
    assert files.service["spec"]["selector"] == labels
    assert container["image"] == server["image"] and not container["image"].endswith(":latest")
    assert server["build"]["dockerfile"] == f"deploy/{files.name}/Dockerfile"
    assert server["build"]["args"] == files.lines("ARG")
    assert (files.folder / server["build"]["context"]).resolve() == REPO
    # Who, and what it may do and write.
    context = files.pod["securityContext"]
    user = f"{context['runAsUser']}:{context['runAsGroup']}"
    assert [user] == files.lines("USER") and context["runAsNonRoot"]
    for service in files.compose["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert ":" in service["image"] and service["mem_limit"] and service["cpus"]
        assert service["user"] == user
    for each in files.pod["containers"]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert each["resources"]["limits"]["memory"] and each["resources"]["requests"]["memory"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    kinds = {volume["name"]: volume for volume in files.pod["volumes"]}
    writable = {path for path, mount in mounts.items() if "emptyDir" in kinds[mount["name"]]}
    shm = {"/dev/shm"} if "shm_size" in server else set()
    assert writable == {*server["tmpfs"], *shm} and "/tmp" in writable
    assert ("HOME", "/tmp") in [tuple(pair.split("=")) for pair in files.lines("ENV")[0].split()]
    volumes = {volume["target"]: volume for volume in server["volumes"]}
    assert mounts.keys() - writable <= volumes.keys()
    assert all(mounts[path]["readOnly"] for path in mounts.keys() - writable)
    assert all(volume["read_only"] for volume in volumes.values())
    # Time to stop.
    limit, stop = drain_seconds(files.name), container["lifecycle"]["preStop"]["exec"]["command"]
    assert int(server["stop_grace_period"].removesuffix("s")) > limit + 5
    assert files.pod["terminationGracePeriodSeconds"] > limit + 5 + int(stop[1])


# ------------------------------------------------------------------------------ the image's command
def model_for(name, bundle, folder):
    """What the server of a container reads, in `folder`."""
    if name == "simple_serving":
        shutil.copytree(bundle, folder)
    elif name == "paddle_serving":
        flags = ["--dirname", bundle, "--serving_server", folder]
        convert.main([str(flag) for flag in [*flags, "--serving_client", f"{folder}.client"]])
    else:
        flags = ["--model_path_prefix", bundle / "float32", "--output_dir", folder]
        make_repository.main([str(flag) for flag in flags])


def local_command(files, root, ports):
    """The image's CMD with the folders of the container under `root`, and free ports."""
    command = json.loads(files.lines("CMD")[0])
    assert command[0] in ("python", "python3")
    python = sys.executable
    if files.name == "simple_serving":
        python = os.environ.get("PREDICTOR_PYTHON", python)  # has no more than its requirements
        command += ["--port", str(ports["http"])]
    elif files.name == "triton_serving":
        # The script that finds the test's tritonserver runs the image's serve.py, beside it.
        for helper in ("local_server.py", "onnxruntime_backend.py"):
            shutil.copy(files.folder / helper, root / "app")
        command[1] = command[1].replace("serve.py", "local_server.py")
        command += ["--http_port", str(ports["http"]), "--grpc_port", str(ports["grpc"])]
        command += ["--metrics_port", "0"]
    else:
        path = root / "app/deploy/paddle_serving/config.yml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config.update(rpc_port=ports["grpc"], http_port=ports["http"])
        config.update(rpc_host="127.0.0.1", http_host="127.0.0.1")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    folders = ("/app", "/models", "/tmp")
    command = [f"{root}{word}" if word.startswith(folders) else word for word in command]
    return [python, *("127.0.0.1" if word == "0.0.0.0" else word for word in command[1:])]


def contents(root, tmpfs):
    """{path: time of its last change} outside of the folders that may be written."""
    files = (path for path in root.rglob("*") if path.is_file())
    tmp = {root / path.lstrip("/") for path in tmpfs} | {root}
    found = {path: path.stat().st_mtime_ns for path in files if {*path.parents} & tmp == {root}}
    # Where Python cannot write its caches, it does without.
    return {path: time for path, time in found.items() if path.suffix != ".pyc"}


def get(port, path):
    """The status of an answer; None if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def healthy(files, port):
    """What the commands that check the server say, with the port changed: a list."""
    old, new = f"'127.0.0.1', {PORTS[files.name]['http']},", f"'127.0.0.1', {port},"
    commands = [[sys.executable, *command[1:]] for command in files.check_commands()]
    commands = [[word.replace(old, new) for word in command] for command in commands]
    return [subprocess.run(c, capture_output=True).returncode == 0 for c in commands]


def ask(files, port):
    """The label names that the server gives TEXT."""
    path, request = {
        "simple_serving": ("/predict", {"texts": [TEXT]}),
        "paddle_serving": (
            "/seq_cls/prediction",
            {"key": ["sentence"], "value": [json.dumps([TEXT])]},
        ),
        "triton_serving": (
            "/v2/models/seqcls/infer",
            {"inputs": [{"name": "INPUT", "shape": [1, 1], "datatype": "BYTES", "data": [TEXT]}]},
        ),
    }[files.name]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    reply = json.loads(answer.read())
    connection.close()
    assert answer.status == 200, reply
    if files.name == "simple_serving":
        return [given["label"] for given in reply["results"][0]["labels"]]
    if files.name == "paddle_serving":
        return json.loads(dict(zip(reply["key"], reply["value"]))["label"])[0]
    outputs = {output["name"]: output["data"] for output in reply["outputs"]}
    return [label for label in outputs["label"] if label]


@pytest.fixture
def image(files, bundle, tmp_path):
    """What a container would see, as a folder, with the model where Kubernetes mounts it."""
    needs_package(PACKAGES[files.name])
    (tmp_path / "tmp").mkdir()
    build_image(files, tmp_path)
    (mount,) = {m["mountPath"] for m in files.container["volumeMounts"] if m["name"] == "models"}
    model_for(files.name, bundle, tmp_path / mount.lstrip("/"))
    return tmp_path


@contextlib.contextmanager
def started(command, log_file, **settings):
    with open(log_file, "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def reachable(files, image, port, log_file):
    """The port for clients and probes: the server's, or that of Triton's proxy, which runs, too."""
    if "proxy" not in files.compose["services"]:
        yield port
        return
    outer, inner = free_ports(2)
    config = (
        (files.folder / "nginx.conf").read_text(encoding="utf-8").replace("/tmp", f"{image}/tmp")
    )
    for old, new in ((8000, port), (8081, inner)):
        config = config.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    config = config.replace(f"listen {PROXY_PORT};", f"listen 127.0.0.1:{outer};")
    (image / "nginx.conf").write_text(config, encoding="utf-8")
    _, *flags = files.compose["services"]["proxy"]["entrypoint"]
    flags[flags.index("/etc/nginx/nginx.conf")] = image / "nginx.conf"
    with started([tool("nginx"), *flags], log_file) as process:
        yield outer
        process.send_signal(signal.SIGQUIT)  # as its image has it
        assert process.wait(PATIENCE) == 0


def test_command(files, image, bundle, tmp_path_factory):
    (expected,), _ = predictor.Predictor(bundle / "float32").predict([TEXT])
    ports = dict(zip(PORTS[files.name], free_ports(2)))
    log_file = tmp_path_factory.mktemp("log") / "log.txt"
    environment = dict(pair.split("=") for pair in files.lines("ENV")[0].split())
    environment = {k: v.replace("/tmp", f"{image}/tmp") for k, v in environment.items()}
    environment = {**os.environ, **environment, "TMPDIR": f"{image}/tmp"}
    command = local_command(files, image, ports)
    folder = image / files.lines("WORKDIR")[-1].lstrip("/")
    with contextlib.ExitStack() as stack:
        client_port = stack.enter_context(reachable(files, image, ports["http"], log_file))
        before = contents(image, files.server["tmpfs"])
        assert not any(healthy(files, ports["http"]))
        server = started(command, log_file, cwd=folder, env=environment)
        process = stack.enter_context(server)

        def ready():
            assert process.poll() is None, log_file.read_text()
            return all(get(client_port, path) == 200 for path in files.check_paths())

        wait_until(ready, log_file.read_text)
        assert all(healthy(files, ports["http"]))
        assert ask(files, client_port) == expected
        process.send_signal(signal.SIGTERM)
        grace = int(files.server["stop_grace_period"].removesuffix("s"))
        assert process.wait(grace) == 0, log_file.read_text()
        assert contents(image, files.server["tmpfs"]) == before
