"""Load on a running server, and the same load on the model in this process.

    python benchmarks/serving_load.py --server paddle_serving_http --url http://127.0.0.1:9878 \
        --data_file data/data.txt --pid 1234
    python benchmarks/serving_load.py --server in_process --model_path_prefix export/float32 \
        --data_file data/data.txt

Every client sends its next request when the last one is answered. --pid: the server's first
process; its memory (with its children's) is read each second. Clients and server share the cores.
"""

import contextlib
import importlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import common
import numpy as np

import utils

CLIENTS = {"paddle_serving_http": "http_client", "paddle_serving_grpc": "rpc_client"}
TRITON = {"triton_http": "http", "triton_grpc": "grpc"}


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--server", choices=[*CLIENTS, *TRITON, "in_process"], required=True, help="what is asked")
    add("--url", help="address of the server")
    add("--model_path_prefix", help="static graph for in_process, e.g. export/float32")
    add("--data_file", required=True, help="texts, one per line")
    add("--clients", type=utils.at_least(1), default=16, help="requests side by side")
    add("--batch_size", type=utils.at_least(1), default=1, help="texts per request")
    add("--seconds", type=utils.at_least(1.0), default=60.0, help="how long")
    add("--pid", type=utils.at_least(1), help="process whose memory is watched")
    args = parser.parse_args(argv)
    needed = "model_path_prefix" if args.server == "in_process" else "url"
    if getattr(args, needed) is None:
        raise utils.UserError(f"--server {args.server} needs --{needed}")
    return args


def memory(pid):
    """Megabytes of a process and all its descendants (resident, shared pages counted each time)."""
    import psutil  # comes with visualdl

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(pid)
        for process in [server, *server.children(recursive=True)]:
            total += process.memory_info().rss
    return total / 1e6


def make_predict(args):
    """A function that labels a list of texts."""
    if args.server == "in_process":
        from predictor import Predictor

        return Predictor(args.model_path_prefix).predict
    if args.server in TRITON:
        return triton_predict(args.url, TRITON[args.server])
    client = importlib.import_module(CLIENTS[args.server])
    return lambda texts: client.predict(args.url, texts)


def triton_predict(url, protocol):
    """The same for Triton; each thread has a connection of its own."""
    from seqcls_grpc_client import Client

    of_thread = threading.local()

    def predict(texts):
        if not hasattr(of_thread, "client"):
            of_thread.client = Client(url, protocol)
        return of_thread.client.classify(texts)

    return predict


def main(argv=None):
    args = parse_args(argv)
    texts, predict = list(utils.read_texts(args.data_file)), make_predict(args)
    chunks = list(utils.chunks(texts, args.batch_size))
    try:
        predict(chunks[0])
    except Exception as error:  # every client has its own
        raise utils.UserError(f"--server {args.server}: {error}") from error
    seconds, counts, errors, megabytes = [], [], [], []
    start = time.perf_counter()

    def client(turn):
        while time.perf_counter() < start + args.seconds:
            chunk, sent = chunks[turn % len(chunks)], time.perf_counter()
            try:
                predict(chunk)
            except Exception as error:  # counted and shown
                errors.append(repr(error))
                continue
            seconds.append(time.perf_counter() - sent)
            counts.append(len(chunk))
            turn += args.clients

    with ThreadPoolExecutor(args.clients) as pool:
        running = {pool.submit(client, i) for i in range(args.clients)}
        while running:
            if args.pid:
                megabytes.append(memory(args.pid))
            running = wait(running, timeout=1).not_done
    total = time.perf_counter() - start
    row = {
        "server": args.server,
        "clients": args.clients,
        "batch_size": args.batch_size,
        "requests": len(seconds),
        "errors": len(errors),
        "requests_per_second": len(seconds) / total,
        "texts_per_second": sum(counts) / total,
        "p50_ms": 1000 * float(np.percentile(seconds, 50)) if seconds else None,
        "p99_ms": 1000 * float(np.percentile(seconds, 99)) if seconds else None,
        "processor": common.processor(),
    }
    if megabytes:
        # After the first quarter, when all buffers have been made.
        steady = megabytes[len(megabytes) // 4 :]
        row["megabytes_first_last_most"] = [round(steady[0]), round(steady[-1]), round(max(steady))]
    common.print_row(**row)
    for error in sorted(set(errors))[:5]:
        print(error, file=sys.stderr)


if __name__ == "__main__":
    utils.cli(main)
