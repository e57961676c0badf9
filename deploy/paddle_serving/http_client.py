"""Ask the server over HTTP; needs nothing but Python, and may be copied to any machine.

    python http_client.py --url http://127.0.0.1:9878
    python http_client.py --url http://127.0.0.1:9878 --data_file texts.txt
    python http_client.py --url http://127.0.0.1:9878 --ready     # exit status 0 or 1

From Python: `predict("http://127.0.0.1:9878", ["婚后生育一子。"])`.
"""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request

SAMPLES = [
    "五松新村房屋是被告婚前购买的；",
    "被告于2016年3月将车牌号为皖B×××××出售了2.7万元，被告通过原告偿还了齐荷花人民币2.6万元，"
    "原、被告尚欠齐荷花2万元。",
    "2、判令被告返还借婚姻索取的现金33万元，婚前个人存款10万元；",
    "一、判决原告于某某与被告杨某某离婚；",
]


class ServerError(Exception):
    """The server can't be reached or refuses the request; the message is one line."""


def parse_args(doc, argv, url):
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--url", default=url, help="address of the server")
    add("--data_file", help="UTF-8 texts, one per line; None: four examples")
    add("--batch_size", type=int, default=32, help="texts per request")
    add("--timeout", type=float, default=60, help="seconds to wait for an answer")
    add("--ready", action="store_true", help="only ask whether the server is ready")
    args = parser.parse_args(argv)
    if not (args.batch_size > 0 and 0 < args.timeout < float("inf")):
        parser.error("--batch_size and --timeout must be positive")
    return args


def run(args, predict, ready):
    """The clients' common part; returns the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    try:
        if not args.ready:
            print_labels(args, predict)
        elif not ready(args.url):
            print("not ready", flush=True)
            return 1
        else:
            print("ready", flush=True)
    except BrokenPipeError:  # stdout was closed, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout again when it exits
        return 141
    except (ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def print_labels(args, predict):
    texts = read_texts(args.data_file) if args.data_file else SAMPLES
    for start in range(0, len(texts), args.batch_size):
        chunk = texts[start : start + args.batch_size]
        for text, (labels, scores) in zip(chunk, predict(args.url, chunk, args.timeout)):
            print("data: ", text)
            print("label: ", ",".join(labels))
            print("score: ", ",".join(f"{score:.3f}" for score in scores))
            print("--------------------", flush=True)


def read_texts(path):
    """The lines of a UTF-8 file (BOM, LF or CRLF); a lone carriage return is part of its text."""
    texts = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8").replace("\ufeff", "")  # byte order marks
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid UTF-8; save it as UTF-8") from error
            texts.append(text.removesuffix("\n").removesuffix("\r"))
    if not texts:
        raise ValueError(f"{path}: empty file; write one text per line")
    return texts


def predict(url, texts, timeout=60):
    """[(label names, scores)] of a list of texts, labels in the order of label.txt."""
    request = {"key": ["sentence"], "value": [json.dumps(texts, ensure_ascii=False)]}
    reply = ask(url, json.dumps(request).encode(), timeout)
    return unpack(**reply, count=len(texts))


def ready(url, timeout=5):
    """True if the server can answer."""
    try:
        return ask(url, None, timeout)["err_no"] == 0
    except ServerError:
        return False


def ask(url, body, timeout):
    """The server's reply as a dict; raises ServerError. Without a body: is it ready?"""
    path, headers = "prediction" if body else "ready", {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url.rstrip('/')}/seq_cls/{path}", body, headers)
    # The environment's proxy is for the internet; the server is near.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            with opener.open(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerError(f"no answer from {url}: {error}") from error
    try:
        reply = json.loads(text)
        if "error" in reply:  # of the HTTP server, not of Paddle Serving
            raise ServerError(f"HTTP status {status}: {' '.join(str(reply['error']).split())}")
        return {name: reply[name] for name in ("err_no", "err_msg", "key", "value")}
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"unexpected reply from {url} (HTTP status {status})") from error


def unpack(err_no, err_msg, key, value, count):
    """[(label names, scores)] of a reply to `count` texts; raises ServerError for an error."""
    if err_no:
        raise ServerError(f"error {err_no}: {' '.join(err_msg.split())}")
    try:
        reply = dict(zip(key, map(json.loads, value)))
        answers = list(zip(reply["label"], reply["score"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"malformed reply ({error!r})") from error
    if len(answers) != count:
        raise ServerError(f"{len(answers)} answers to {count} texts")
    return answers


if __name__ == "__main__":
    sys.exit(run(parse_args(__doc__, None, "http://127.0.0.1:9878"), predict, ready))
