"""HTTP for service.py: POST /seq_cls/prediction, GET /seq_cls/ready, in Paddle Serving's format.

It replaces Paddle Serving's gateway, which reads bodies of any size into memory, has no time limit,
listens on all addresses and exists for x86 only.
"""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seq_cls import BAD_REQUEST, BUSY, NAME, NOT_READY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from http_server import Front, Limits, send_json

READY = f"/{NAME}/ready"
METHODS = {f"/{NAME}/prediction": "POST", READY: "GET"}
USAGE = f"use POST /{NAME}/prediction or GET {READY}"
STATUS = {0: 200, BAD_REQUEST: 400, BUSY: 429}  # of an err_no; 500 for others


def make_front(servicer, limits):
    """The HTTP server for `servicer`, which has Request, inference(...) and ready()."""
    # As many again are there to say "busy".
    threads = ThreadPoolExecutor(2 * limits["max_requests"], "http")
    front_limits = Limits(
        max_body_bytes=limits["max_body_bytes"],
        max_connections=max(Limits.max_connections, 4 * limits["max_requests"]),
        receive_seconds=limits["receive_seconds"],
        drain_seconds=limits["drain_seconds"],
    )

    async def app(scope, receive, send):
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        path, headers = scope["path"], []
        if path not in METHODS:
            answer = 404, BAD_REQUEST, USAGE
        elif scope["method"] != METHODS[path]:
            answer, headers = (405, BAD_REQUEST, USAGE), [(b"allow", METHODS[path].encode())]
        elif path == READY:
            ready = servicer.ready() and not scope["front"].stopping
            answer = (200, 0, "") if ready else (503, NOT_READY, "")
        else:
            body, loop = (await receive())["body"], asyncio.get_running_loop()
            answer = await loop.run_in_executor(
                threads, predict, servicer, body, scope["request_id"]
            )
        status, err_no, err_msg, *lists = answer
        key, value = map(list, lists or ((), ()))
        scope["access"]["err_no"] = err_no
        reply = {"err_no": err_no, "err_msg": err_msg, "key": key, "value": value}
        await send_json(send, status, reply, headers)

    return Front(app, front_limits, health=[READY])


def predict(servicer, body, request_id):
    """(HTTP status, err_no, err_msg[, key, value]) of a prediction's body."""
    try:
        content = json.loads(body.decode("utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not an object")
        key, value = content.get("key", []), content.get("value", [])
        if not isinstance(key, list) or not isinstance(value, list):
            raise TypeError("key and value must be lists")
        request = servicer.Request(key=key, value=value)
    except (ValueError, TypeError, RecursionError) as error:
        return 400, BAD_REQUEST, f"the body is not a request in UTF-8 JSON: {error}"
    if "tensors" in content:
        return 400, BAD_REQUEST, "tensors are not accepted"
    answer = servicer.inference(request, None, request_id)
    status = STATUS.get(answer.err_no, 500)
    return status, answer.err_no, answer.err_msg, answer.key, answer.value
