"""Load on a running server, and the same load on the model in this process.

    python benchmarks/serving_load.py --server paddle_serving_http --url http://127.0.0.1:9878 \
        --data_file data/data.txt --pid 1234
    python benchmarks/serving_load.py --server in_process --model_path_prefix export/float32 \
        --data_file data/data.txt

Every client sends its next request when the last one is answered. --pid: the server's first
process; its memory (with its children's) is read each second. Clients and server share the cores.
"""

import importlib
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
DEPLOY = REPO / "deploy"
sys.path[:0] = [str(DEPLOY / name) for name in ("predictor", "paddle_serving", "triton_serving")]
sys.path.insert(0, str(REPO))
import utils  # noqa: E402

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
    if (args.server == "in_process") != (args.model_path_prefix is not None):
        raise utils.UserError("in_process needs --model_path_prefix, the servers --url")
    return args


def memory(pid):
    """Megabytes of a process and all its descendants (resident, shared pages counted each time)."""
    parents, pages = {}, {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)], pages[int(entry.name)] = int(stat[1]), int(stat[21])
        except OSError:  # it has just ended
            pass
    family = {pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(pages.get(p, 0) for p in family) * 4096 / 1e6


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
    predict(chunks[0])
    seconds, errors, lock = [], [], threading.Lock()
    deadline = time.perf_counter() + args.seconds

    def client(number):
        turn = number
        while time.perf_counter() < deadline:
            chunk = chunks[turn % len(chunks)]
            start = time.perf_counter()
            try:
                predict(chunk)
            except Exception as error:  # counted and shown
                with lock:
                    errors.append(repr(error))
                continue
            with lock:
                seconds.append((time.perf_counter() - start, len(chunk)))
            turn += args.clients

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(args.clients)]
    for thread in threads:
        thread.start()
    megabytes = []
    while any(thread.is_alive() for thread in threads):
        if args.pid:
            megabytes.append(memory(args.pid))
        time.sleep(1)
    for thread in threads:
        thread.join()
    total, times = time.perf_counter() - start, [1000 * s for s, _ in seconds]
    row = {
        "server": args.server,
        "clients": args.clients,
        "batch_size": args.batch_size,
        "requests": len(times),
        "errors": len(errors),
        "requests_per_second": round(len(times) / total, 1),
        "texts_per_second": round(sum(count for _, count in seconds) / total, 1),
        "p50_ms": round(float(np.percentile(times, 50)), 1) if times else None,
        "p99_ms": round(float(np.percentile(times, 99)), 1) if times else None,
    }
    if megabytes:
        # After the first quarter, when all buffers have been made.
        steady = megabytes[len(megabytes) // 4 :]
        row["megabytes_first_last_most"] = [round(steady[0]), round(steady[-1]), round(max(steady))]
    print(json.dumps(row), flush=True)
    for error in sorted(set(errors))[:5]:
        print(error, file=sys.stderr)


if __name__ == "__main__":
    utils.cli(main)
