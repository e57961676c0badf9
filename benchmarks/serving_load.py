"""Load on every server of deploy/ and on the same model in this process; one table.

    python benchmarks/serving_load.py --model_path_prefix export/float32 --data_file texts.txt

All servers are started here and run on the same cores; they are asked in turns, so that a busy
machine slows each of them. A client sends its next request, over the connection that it keeps, when
the last one is answered. "in_process" is the predictor without a server; with 1 client it is called
for one request after the other, and for all texts at once, which is the most that merging could
give. Every answer is compared with the predictor's.
CPU ms: of the server with all its processes, for one request; in process it includes the client.
MB: the most memory of these processes, pages that they share counted each time.
"""

import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import servers
from predictor import Predictor

import utils

IN_PROCESS = "in_process"
TOLERANCES = {"cpu": 1e-4, "gpu": 1e-2}  # of a probability; GPUs take TF32 for float32
COLUMNS = "server clients texts req/s texts/s p50_ms p99_ms cpu_ms client_cpu_ms MB errors wrong"


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--model_path_prefix", required=True, help="static graph of a bundle, e.g. export/float32")
    add("--data_file", required=True, help="texts, one per line")
    names = [IN_PROCESS, *servers.CLIENTS]
    add("--servers", nargs="+", choices=names, default=names, help="what is asked")
    add("--device", choices=["cpu", "gpu"], default="cpu", help="gpu: in_process, simple_serving")
    add("--clients", type=utils.at_least(1), default=16, help="requests side by side")
    add("--texts", nargs="+", default=["1", "1-8"], help="texts of a request")
    add("--seconds", type=utils.at_least(1.0), default=60.0, help="of each row, in all turns")
    add("--turns", type=utils.at_least(1), default=3, help="into which the seconds are divided")
    args = parser.parse_args(argv)
    if args.device == "gpu" and not set(args.servers) <= {IN_PROCESS, "simple_serving"}:
        raise utils.UserError("--device gpu: give --servers in_process simple_serving")
    for value in args.texts:
        low, _, high = value.partition("-")
        if not (low.isdigit() and (high or low).isdigit() and 0 < int(low) <= int(high or low)):
            raise utils.UserError(f"--texts {value}: give a number, or the least and most as 1-8")
    return args


def main(argv=None):
    args = parse_args(argv)
    predictor = Predictor(args.model_path_prefix, args.device, batch_size=64)
    texts, tolerance = list(utils.read_texts(args.data_file)), TOLERANCES[args.device]
    expected = list(zip(*predictor.predict(texts)))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {}
        for name in args.servers:
            kind = servers.CLIENTS.get(name, [None])[0]
            if kind and kind not in running:
                server = servers.Running(
                    kind, args.model_path_prefix, folder / kind, device=args.device
                )
                running[kind] = stack.enter_context(server)
        rows = []
        for count in args.texts:
            requests = make_requests(texts, expected, count)
            for name in args.servers:
                for clients in sorted({1, args.clients}) if name == IN_PROCESS else [args.clients]:
                    rows.append(Row(name, clients, count, requests, predictor, running))
        if IN_PROCESS in args.servers:  # what the best merging could give
            all_texts = [(texts, expected)]
            rows.append(Row(IN_PROCESS, 1, "all", all_texts, predictor, running))
        for row in rows:
            row.measure(2.0, tolerance)  # warm-up
            row.clear()
        for _ in range(args.turns):
            for row in rows:
                row.measure(args.seconds / args.turns, tolerance)
    print(f"{utils.processor()}, {utils.num_cores()} cores; medians and ranges of turns below\n")
    print(f"| {' | '.join(COLUMNS.split())} |", "|---" * len(COLUMNS.split()) + "|", sep="\n")
    for row in rows:
        print(row)
    for row in rows:
        turns = ", ".join(f"{x:.1f}" for x in row.rates)
        print(f"{row.name}, {row.clients} clients, {row.count} texts: {turns} req/s")
        for error in sorted(set(row.errors))[:3]:
            print(f"{row.name}: {error}", file=sys.stderr)
    if any(row.wrong for row in rows):
        sys.exit(1)


def make_requests(texts, expected, count):
    """[(texts, expected answers)] with `count` texts each; "1-8": as many as chance says."""
    low, _, high = count.partition("-")
    rng, requests, start = np.random.default_rng(3), [], 0
    while start < len(texts):
        end = start + int(rng.integers(int(low), int(high or low) + 1))
        requests.append((texts[start:end], expected[start:end]))
        start = end
    return requests


class Row:
    """A line of the table: one server, so many clients, so many texts a request."""

    def __init__(self, name, clients, count, requests, predictor, running):
        self.name, self.clients, self.count, self.requests = name, clients, count, requests
        self.predictor = predictor
        kind, self.connect = servers.CLIENTS.get(name, (None, None))
        self.server = running.get(kind)
        self.next = 0
        self.clear()

    def clear(self):
        self.seconds, self.errors, self.rates = [], [], []
        self.texts = self.wrong = self.megabytes = 0
        self.total = self.cpu = self.client_cpu = 0.0

    def client(self):
        if self.server:
            return self.connect(self.server)

        def ask(texts):
            names, probs = self.predictor.predict(texts)
            index = {name: i for i, name in enumerate(self.predictor.info.labels)}
            return [(n, [p[index[x]] for x in n]) for n, p in zip(names, probs.tolist())]

        return ask

    def measure(self, seconds, tolerance):
        """Adds a turn; tolerance: see servers.wrong_answers."""
        before, own, done = self.cpu_seconds(), time.process_time(), len(self.seconds)
        lock, start = threading.Lock(), time.perf_counter()
        end = start + seconds

        def run():
            ask = self.client()
            while (sent := time.perf_counter()) < end:
                with lock:
                    self.next += 1
                texts, expected = self.requests[self.next % len(self.requests)]
                try:
                    answers = ask(texts)
                except Exception as error:  # counted and shown
                    self.errors.append(repr(error))
                    ask = self.client()
                    continue
                took = time.perf_counter() - sent
                wrong = servers.wrong_answers(answers, expected, self.predictor.info, tolerance)
                with lock:
                    self.seconds.append(took)
                    self.texts += len(texts)
                    self.wrong += wrong

        threads = [threading.Thread(target=run) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
        self.total += took
        self.rates.append((len(self.seconds) - done) / took)
        self.client_cpu += time.process_time() - own
        self.cpu += self.cpu_seconds() - before
        memory = (process.memory_info().rss for process in self.processes())
        self.megabytes = max(self.megabytes, sum(memory) / 1e6)

    def processes(self):
        import psutil  # comes with visualdl

        first = psutil.Process(self.server.pid if self.server else None)
        return [first, *(first.children(recursive=True) if self.server else [])]

    def cpu_seconds(self):
        """Of the server's processes so far."""
        times = [process.cpu_times() for process in self.processes()]
        return sum(time.user + time.system for time in times)

    def __str__(self):
        done = max(1, len(self.seconds))
        p50, p99 = (1000 * np.percentile(self.seconds or [np.nan], p) for p in (50, 99))
        cells = [self.name, self.clients, self.count, f"{statistics.median(self.rates):.1f}"]
        cells += [f"{self.texts / self.total:.1f}", f"{p50:.1f}", f"{p99:.1f}"]
        cells += [f"{1000 * self.cpu / done:.1f}", f"{1000 * self.client_cpu / done:.1f}"]
        cells += [round(self.megabytes), len(self.errors), self.wrong]
        return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    utils.cli(main)
