"""Ask the server over HTTP; needs nothing but Python, and may be copied to any machine.

    python http_client.py --url http://127.0.0.1:9878
    python http_client.py --url http://127.0.0.1:9878 --data_file texts.txt
    python http_client.py --url http://127.0.0.1:9878 --ready     # exit status 0 or 1

From Python: `predict("http://127.0.0.1:9878", ["婚后生育一子。"])`.
"""

import argparse
import http.client
import json
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


def positive(text):
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse_args(doc, argv, url):
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--url", default=url, help="address of the server")
    add("--data_file", help="UTF-8 texts, one per line; None: four examples")
    add("--batch_size", type=positive, default=32, help="texts per request")
    add("--timeout", type=float, default=60, help="seconds to wait for an answer")
    add("--ready", action="store_true", help="only ask whether the server is ready")
    return parser.parse_args(argv)


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
        return {name: reply[name] for name in ("err_no", "err_msg", "key", "value")}
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"HTTP status {status} from {url}, which is no such server") from error


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


def run(args, predict, ready):
    """The clients' common part; returns the exit status."""
    if args.ready:
        is_ready = ready(args.url)
        print("ready" if is_ready else "not ready")
        return 0 if is_ready else 1
    texts = SAMPLES
    try:
        if args.data_file:
            with open(args.data_file, encoding="utf-8-sig") as file:
                texts = file.read().removesuffix("\n").split("\n")
        for start in range(0, len(texts), args.batch_size):
            chunk = texts[start : start + args.batch_size]
            for text, (labels, scores) in zip(chunk, predict(args.url, chunk, args.timeout)):
                print("data: ", text)
                print("label: ", ",".join(labels))
                print("score: ", ",".join(f"{score:.3f}" for score in scores))
                print("--------------------")
    except (ServerError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(parse_args(__doc__, None, "http://127.0.0.1:9878"), predict, ready))
