"""Label texts over plain HTTP with ONNX Runtime; no Paddle.

    python server.py --model_path_prefix ../../export/float32
    curl http://127.0.0.1:8000/predict -d '{"texts": ["婚后生育一子。"]}'

One process. Texts of all requests are merged into batches (batching.py), bundles are replaced while
it runs (loaded_models.py), and ../http_server.py keeps slow and broken clients away.
"""

import asyncio
import contextlib
import platform
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from swagger_ui_bundle import swagger_ui_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from batching import Batcher, GoneError, Job, LateError, QueueFullError
from http_server import Front, Limits
from loaded_models import Models, parse_models
from messages import OPENAPI, InvalidError, parse_request, reply
from monitoring import Metrics

import utils
from utils import UserError, at_least

PAGE = Path(__file__).with_name("index.html")
HEALTH = "/health/live", "/health/ready"
DOCS_FILES = "swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"
VERSIONS = "onnxruntime", "tokenizers", "numpy", "fastapi", "uvicorn"


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    prefix = "path of the static graph without its suffix, or NAME=PATH for each of several models"
    add("--model_path_prefix", nargs="+", required=True, help=prefix)
    add("--max_seq_length", type=at_least(3), help="longest sequence; None: the bundle's")
    utils.add_limit_flags(add, "the bundle's")
    again = "look for replaced bundles so often; None: only after SIGHUP"
    add("--reload_seconds", type=at_least(0.1), help=again)
    add = parser.add_argument_group("device").add_argument
    add("--device", choices=["cpu", "gpu"], default="cpu", help="where to run")
    add("--device_id", type=at_least(0), default=0, help="number of the GPU")
    add("--use_fp16", action="store_true", help="half precision (GPU only)")
    add("--use_quantize", action="store_true", help="dynamic int8 (CPU only)")
    add("--num_threads", type=at_least(1), default=1, help="CPU threads of a forward pass")
    passes = "forward passes at the same time; None: cores / num_threads, on a GPU 1"
    add("--num_passes", type=at_least(1), help=passes)
    add = parser.add_argument_group("address").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    add("--port", type=at_least(0), default=8000, help="port to listen on")
    add("--no_access_log", action="store_true", help="no line for each request")
    add = parser.add_argument_group("limits").add_argument
    add("--batch_size", type=at_least(1), default=32, help="most texts of a forward pass")
    add("--max_queue", type=at_least(1), default=1024, help="most texts that wait; more: 429")
    add("--max_texts", type=at_least(1), default=64, help="most texts of a request")
    add("--max_text_bytes", type=at_least(1), default=32768, help="longest text in UTF-8")
    add("--max_body_bytes", type=at_least(1), default=1 << 20, help="largest request body")
    add("--max_connections", type=at_least(1), default=512, help="open connections; more: 503")
    arrive = "for a request to arrive; later: 408"
    add("--receive_seconds", type=at_least(0.1), default=10.0, help=arrive)
    seconds = at_least(0.0)
    add("--wait_seconds", type=seconds, default=30.0, help="in the queue; longer: 503")
    add("--idle_seconds", type=seconds, default=60.0, help="of a connection between two requests")
    add("--grace_seconds", type=seconds, default=1.0, help="after SIGTERM, still taking requests")
    add("--drain_seconds", type=seconds, default=30.0, help="after that, to answer what was taken")
    args = parser.parse_args(argv)
    if args.use_fp16 and args.device != "gpu":
        raise UserError("--use_fp16 needs --device gpu; on the CPU use --use_quantize")
    if args.use_quantize and args.device != "cpu":
        raise UserError("--use_quantize needs --device cpu; on the GPU use --use_fp16")
    return args


def main(argv=None):
    args = parse_args(argv)
    prefixes = parse_models(args.model_path_prefix)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the bundles are being read anyway
    models = Models(
        prefixes,
        args.batch_size,
        device=args.device,
        precision="fp16" if args.use_fp16 else "int8" if args.use_quantize else "fp32",
        device_id=args.device_id,
        num_threads=args.num_threads,
        max_seq_length=args.max_seq_length,
        min_labels=args.min_labels,
        max_labels=args.max_labels,
    )
    limits = Limits(
        max_body_bytes=args.max_body_bytes,
        max_connections=args.max_connections,
        receive_seconds=args.receive_seconds,
        idle_seconds=args.idle_seconds,
        grace_seconds=args.grace_seconds,
        drain_seconds=args.drain_seconds,
    )
    service = Service(models, args)
    front = Front(
        service, limits, HEALTH, service.metrics.answered, access_log=not args.no_access_log
    )
    status = front.run(args.host, args.port)
    if service.problem:
        raise service.problem
    sys.exit(status)


def error(status, message, headers=None):
    return JSONResponse({"error": message}, status, headers)


async def http_error(request, exception):
    """The framework's own: 404 and 405."""
    what = {404: "no such path; see /docs", 405: f"{request.method} is not allowed here"}
    message = what.get(exception.status_code, str(exception.detail))
    return error(exception.status_code, message, exception.headers)


class Service:
    """The app: its paths, the models and the queue."""

    def __init__(self, models, args):
        self.models, self.args = models, args
        self.reload_now = self.problem = None
        passes = 1 if args.device == "gpu" else max(1, utils.num_cores() // args.num_threads)
        passes = args.num_passes or passes
        sizes = args.batch_size, args.max_queue, passes
        self.batcher = Batcher(*sizes, args.device, self.count_batch)
        self.metrics = Metrics(lambda: self.batcher.queued)
        self.limits = {
            name: getattr(args, name)
            for name in "max_texts max_text_bytes max_body_bytes max_queue batch_size".split()
        }
        self.api = FastAPI(
            title="Multi-label text classification",
            version="1",
            docs_url=None,  # its pages load scripts from another host
            redoc_url=None,
            redirect_slashes=False,
            lifespan=self.lifespan,
            exception_handlers={HTTPException: http_error},
        )
        self.api.openapi_version = "3.0.3"  # what the bundled Swagger UI reads
        self.api.post("/predict", openapi_extra=OPENAPI, summary="Label texts")(self.predict)
        for path, endpoint in (
            ("/info", self.info),
            ("/health/live", self.live),
            ("/health/ready", self.ready),
            ("/metrics", self.show_metrics),
        ):
            self.api.get(path, summary=endpoint.__doc__)(endpoint)
        self.api.get("/docs", include_in_schema=False)(self.docs)
        for name in DOCS_FILES:
            self.add_file(f"/docs/{name}", Path(swagger_ui_path) / name)
        if PAGE.exists():
            self.add_file("/", PAGE)

    async def __call__(self, scope, receive, send):
        """An ASGI app; /predict does without the layers of FastAPI, which cost time."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", "/predict"):
            response = await self.predict(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await self.api(scope, receive, send)

    def add_file(self, path, file):
        async def send_file(request):
            return FileResponse(file)

        self.api.add_route(path, send_file)

    def count_batch(self, size):
        self.metrics.batch.observe(size)

    @contextlib.asynccontextmanager
    async def lifespan(self, _):
        self.batcher.start()
        self.reload_now = asyncio.Event()
        if hasattr(signal, "SIGHUP"):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self.reload_now.set)
        task = asyncio.create_task(self.keep_models())
        yield
        task.cancel()
        self.batcher.close()

    async def keep_models(self):
        try:
            await asyncio.to_thread(self.models.warm_up_all)
        except Exception as problem:
            self.problem = problem
            signal.raise_signal(signal.SIGTERM)
            return
        while True:
            changed_only = False
            try:
                await asyncio.wait_for(self.reload_now.wait(), self.args.reload_seconds)
            except asyncio.TimeoutError:
                changed_only = True
            self.reload_now.clear()
            taken, failed = await asyncio.to_thread(self.models.reload, changed_only)
            self.metrics.reloads.labels("taken").inc(taken)
            self.metrics.reloads.labels("failed").inc(failed)

    async def predict(self, request: Request) -> Response:
        """The labels of each text with their scores; see the schema."""
        try:
            wanted = parse_request(await request.body(), self.models.loaded, self.args)
            scope = request.scope
            job = Job(wanted.model, wanted.texts, scope["gone"], self.args.wait_seconds)
            scope["access"].update(model=wanted.name, texts=len(wanted.texts))
            self.batcher.submit(job)
            probs, cut = await job.done
        except InvalidError as invalid:
            return error(*invalid.args)
        except QueueFullError:
            return error(429, "the queue is full; retry later", {"Retry-After": "1"})
        except LateError:
            seconds = f"{self.args.wait_seconds:g}"
            message = f"no answer within {seconds} s: too many texts wait; retry later"
            return error(503, message, {"Retry-After": "1"})
        except GoneError:
            return Response(status_code=499)  # nobody reads it
        scope["access"]["cut"] = sum(cut)
        return Response(reply(wanted, probs, cut), media_type="application/json")

    async def info(self):
        """Models, limits and versions"""
        versions = {"python": platform.python_version()}
        for name in VERSIONS:
            with contextlib.suppress(PackageNotFoundError):  # onnxruntime-gpu
                versions[name] = version(name)
        return {"models": self.models.describe(), "limits": self.limits, "versions": versions}

    async def live(self):
        """200 while the process can answer"""
        return {"live": True} if self.batcher.alive() else error(503, "a thread has ended")

    async def ready(self, request: Request):
        """200 after the warm-up and until SIGTERM"""
        stopping = request.scope["front"].stopping
        if self.models.warm and not stopping and self.batcher.alive():
            return {"ready": True}
        return error(503, "the server is stopping" if stopping else "the models are warming up")

    async def show_metrics(self):
        """Prometheus"""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def docs(self):
        script, style, icon = (f"docs/{name}" for name in DOCS_FILES)
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=self.api.title,
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
            swagger_ui_parameters={"validatorUrl": None},  # would ask another host
        )


if __name__ == "__main__":
    utils.cli(main)
