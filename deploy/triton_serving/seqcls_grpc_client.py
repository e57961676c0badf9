"""Label texts with a Triton server, over gRPC or HTTP.

    python seqcls_grpc_client.py --url localhost:8001
    python seqcls_grpc_client.py --protocol http --url localhost:8000 --data_file data.txt

Needs tritonclient and NumPy only; copy this one file to the client machine.
"""

import argparse
import importlib
import itertools
import os
import signal
import sys
from http.client import HTTPException

import numpy as np
from tritonclient.utils import InferenceServerException

PORTS = {"grpc": 8001, "http": 8000}
SAMPLES = [
    "五松新村房屋是被告婚前购买的；",
    "被告于2016年3月将车牌号为皖B×××××出售了2.7万元，被告通过原告偿还了齐荷花人民币2.6万元，"
    "原、被告尚欠齐荷花2万元。",
    "2、判令被告返还借婚姻索取的现金33万元，婚前个人存款10万元；",
    "一、判决原告于某某与被告杨某某离婚；",
]


class ClientError(Exception):
    """Something the user can mend; printed as one line, exit status 2."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--protocol", choices=list(PORTS), default="grpc", help="how to talk to the server")
    ports = ", ".join(f"{port} for {name}" for name, port in PORTS.items())
    add("--url", help=f"host:port; None: localhost with port {ports}")
    add("--model_name", default="seqcls", help="model to ask")
    add("--data_file", help="texts, one per line, UTF-8; None: built-in samples")
    add("--batch_size", type=int, default=32, help="texts per request, at most 64")
    add("--connect_timeout", type=float, default=10.0, help="seconds to find the server")
    add("--timeout", type=float, default=120.0, help="seconds to wait for an answer")
    args = parser.parse_args(argv)
    numbers = args.batch_size, args.connect_timeout, args.timeout
    if not all(0 < number < float("inf") for number in numbers):
        parser.error("--batch_size, --connect_timeout and --timeout must be positive")
    return args


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    url = args.url or f"localhost:{PORTS[args.protocol]}"
    client = Client(url, args.protocol, args.model_name, args.connect_timeout, args.timeout)
    client.check_ready()
    print_labels(client, read_texts(args.data_file) if args.data_file else SAMPLES, args.batch_size)


def print_labels(client, texts, batch_size):
    texts, first = iter(texts), 1
    while batch := list(itertools.islice(texts, batch_size)):
        try:
            answers = client.classify(batch)
        except ClientError as error:
            raise ClientError(f"texts {first} to {first + len(batch) - 1}: {error}") from error
        for text, (names, scores) in zip(batch, answers):
            print("text: ", text)
            print("label: ", ",".join(names))
            print("confidence: ", ",".join(f"{score:.3f}" for score in scores))
            print("--------------------", flush=True)
        first += len(batch)


def read_texts(path):
    """Yields the lines of a UTF-8 file (BOM, LF or CRLF)."""
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8").replace("\ufeff", "")  # byte order marks
            except UnicodeDecodeError as error:
                raise ClientError(f"{path}:{number}: not valid UTF-8; save it as UTF-8") from error
            yield text.removesuffix("\n").removesuffix("\r")
    if number == 0:
        raise ClientError(f"{path}: empty file; write one text per line")


def as_bytes(number, text):
    """The text as UTF-8 bytes. Raises ClientError if it is not valid."""
    try:
        if isinstance(text, str):
            return text.encode("utf-8")
        text.decode("utf-8")
    except UnicodeError as error:
        raise ClientError(f"text {number} of the request is not valid UTF-8 ({error})") from error
    return text


class Client:
    """Texts to labels with the ensemble of a Triton server.

    Raises ClientError if the server can't be reached, is not ready or refuses a request.
    """

    def __init__(self, url, protocol="grpc", model_name="seqcls", connect_timeout=10, timeout=120):
        if "://" in url:
            raise ClientError(f"--url {url}: give host:port, without {url.partition('://')[0]}://")
        self.url, self.protocol, self.model_name = url, protocol, model_name
        self.library = importlib.import_module(f"tritonclient.{protocol}")
        if protocol == "grpc":
            self.client = self.library.InferenceServerClient(url)
            self.short, self.long = ({"client_timeout": t} for t in (connect_timeout, timeout))
            self.form = {}
        else:
            self.client = self.library.InferenceServerClient(
                url, connection_timeout=connect_timeout, network_timeout=timeout
            )
            self.short = self.long = {}
            self.form = {"binary_data": False}  # JSON, which nginx.conf lets through

    def close(self):
        self.client.close()

    def check_ready(self):
        """Raises ClientError unless the server and the model are ready."""
        if not self._call(self.client.is_server_ready, **self.short):
            raise ClientError(f"the server at {self.url} is not ready; see its log")
        if not self._call(self.client.is_model_ready, self.model_name, **self.short):
            raise ClientError(f"the server at {self.url} has no model '{self.model_name}' ready")

    def classify(self, texts):
        """[(label names, probabilities)] of up to 64 texts (str or UTF-8 bytes), in their order."""
        raw = [as_bytes(number, text) for number, text in enumerate(texts, 1)]
        array = np.array(raw, dtype=np.object_).reshape(-1, 1)
        text_input = self.library.InferInput("INPUT", array.shape, "BYTES")
        text_input.set_data_from_numpy(array, **self.form)
        outputs = [
            self.library.InferRequestedOutput(name, **self.form) for name in ("label", "confidence")
        ]
        reply = self._call(
            self.client.infer, self.model_name, [text_input], outputs=outputs, **self.long
        )
        # A row is filled up with "" after its labels; a text without labels is all "".
        return [
            (
                [name if isinstance(name, str) else name.decode("utf-8") for name in names if name],
                scores[names.astype(bool)].tolist(),
            )
            for names, scores in zip(reply.as_numpy("label"), reply.as_numpy("confidence"))
        ]

    def _call(self, function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except InferenceServerException as error:
            if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"):
                raise self._unreachable(error.message()) from error
            raise ClientError(f"the server at {self.url}: {error.message()}") from error
        except (OSError, HTTPException, ValueError) as error:  # HTTP: no or no sensible reply
            raise self._unreachable(error) from error

    def _unreachable(self, reason):
        reason = str(reason).split("\n")[0]
        return ClientError(
            f"no answer from {self.url} over {self.protocol} ({reason}); is the server running, "
            f"and is this its {self.protocol} port?"
        )


if __name__ == "__main__":
    # Not by a KeyboardInterrupt: gevent, which tritonclient's HTTP runs on, would print it.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    try:
        main()
    except BrokenPipeError:  # stdout was closed, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout again when it exits
        sys.exit(141)
    except (ClientError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
