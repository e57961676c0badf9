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
    return parser.parse_args(argv)


def post(url, method, body, timeout):
    """The server's reply as a dict; raises ServerError."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url.rstrip('/')}/seq_cls/{method}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        raise ServerError(f"HTTP status {error.code}: {' '.join(text.split())}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerError(f"no answer from {url}: {error}") from error


def unpack(err_no, err_msg, keys, values):
    """[(label names, scores)] of a reply; raises ServerError if it carries an error."""
    if err_no:
        raise ServerError(f"error {err_no}: {' '.join(err_msg.split())}")
    reply = dict(zip(keys, map(json.loads, values)))
    return list(zip(reply["label"], reply["score"]))


def predict(url, texts, timeout=60):
    """[(label names, scores)] of the texts, each text's labels in the order of label.txt."""
    request = {"key": ["sentence"], "value": [json.dumps(texts, ensure_ascii=False)]}
    reply = post(url, "prediction", json.dumps(request).encode(), timeout)
    return unpack(reply["err_no"], reply["err_msg"], reply["key"], reply["value"])


def ready(url, timeout=5):
    """True if the server can answer."""
    try:
        return post(url, "ready", b"{}", timeout)["err_no"] == 0
    except ServerError:
        return False


def run(args, predict, ready):
    """The clients' common part; returns the exit status."""
    if args.ready:
        print("ready" if ready(args.url) else "not ready")
        return 0 if ready(args.url) else 1
    texts = SAMPLES
    try:
        if args.data_file:
            with open(args.data_file, encoding="utf-8-sig") as file:
                texts = file.read().splitlines()
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
