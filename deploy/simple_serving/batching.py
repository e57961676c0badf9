"""Texts of all requests wait in one queue; a few threads merge those of like length and run them.

A batch begins with the text that has waited longest. Texts of the same model join it, those nearest
in length first, as long as the padding that they cost is less than what a forward pass of their own
would: see PASS_TOKENS. Requests are never held back to wait for others.
"""

import asyncio
import threading
import time
from typing import NamedTuple

import numpy as np

import metric
import utils
from utils import logger

# What a forward pass costs beside its tokens, in tokens. Seen with ONNX Runtime on the CPU: 32
# tokens alone take as long as 41 in a batch of 8. A GPU takes hundreds of tokens at once.
PASS_TOKENS = {"cpu": 8, "gpu": 512}


class QueueFullError(Exception):
    """Too many texts wait already."""


class GoneError(Exception):
    """The client has left."""


class LateError(Exception):
    """The texts have waited too long."""


class Job:
    """The texts of a request. await job.done gives (probabilities [texts, classes], which texts
    were cut), or raises GoneError, LateError or what the model raised."""

    def __init__(self, model, texts, gone, seconds):
        self.model, self.texts, self.gone = model, texts, gone
        self.deadline = time.monotonic() + seconds
        self.done = asyncio.get_running_loop().create_future()
        self.probs, self.cut, self.missing, self.error = None, None, len(texts), None

    def settle(self):
        """Called in the event loop once nothing is missing."""
        if self.done.done():
            return
        if self.error:
            self.done.set_exception(self.error)
        else:
            self.done.set_result((self.probs, self.cut))


class Text(NamedTuple):
    ids: np.ndarray
    job: Job
    index: int  # in the job


def like_length(lengths, first, most, pass_tokens):
    """(start, end) of the batch around lengths[first]; the lengths must be in ascending order."""
    start, end, padding = first, first + 1, 0
    while end - start < most:
        count, shorter, longer = end - start, np.inf, np.inf
        if start > 0:
            shorter = lengths[end - 1] - lengths[start - 1]
        if end < len(lengths):
            longer = (lengths[end] - lengths[end - 1]) * count
        if padding + min(shorter, longer) > pass_tokens * count:
            break
        padding += min(shorter, longer)
        if shorter <= longer:
            start -= 1
        else:
            end += 1
    return start, end


def encode(model, texts):
    """Token ids of the texts as utils.encode gives them, and for each whether it was cut."""
    longest = model.info.max_seq_length
    encoded, _ = utils.encode(texts, model.tokenizer, longest + 1)  # one more shows who was longer
    cut = [len(ids) > longest for ids in encoded]
    encoded = [np.append(ids[: longest - 1], ids[-1]) if c else ids for ids, c in zip(encoded, cut)]
    return encoded, cut


class Batcher:
    """The queue and its threads.

    batch_size: most texts of a forward pass. max_queue: most texts that wait. threads: forward
    passes at the same time. device: of PASS_TOKENS. on_batch: called with the number of texts of
    every pass.
    """

    def __init__(self, batch_size, max_queue, threads, device, on_batch):
        self.pass_tokens = PASS_TOKENS[device]
        self.batch_size, self.max_queue, self.on_batch = batch_size, max_queue, on_batch
        self.changed, self.closed, self.loop = threading.Condition(), False, None
        self.arrived, self.waiting, self.queued = [], [], 0  # jobs, texts, number of texts
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(threads)]

    def start(self):
        self.loop = asyncio.get_running_loop()
        for thread in self.threads:
            thread.start()

    def close(self):
        """Ends the threads once they have done what waits."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def alive(self):
        return all(thread.is_alive() for thread in self.threads)

    def submit(self, job):
        """Raises QueueFullError. Of a request that is larger than the queue is long, all texts
        are taken if the queue is empty."""
        count = len(job.texts)
        with self.changed:
            if self.queued and self.queued + count > self.max_queue:
                raise QueueFullError
            self.queued += count
            self.arrived.append(job)
            self.changed.notify()

    def work(self):
        while True:
            with self.changed:
                while not self.arrived and not self.waiting:
                    if self.closed:
                        return
                    self.changed.wait()
                jobs, self.arrived = self.arrived, []
            texts = [
                text for model in {job.model for job in jobs} for text in self.encode(jobs, model)
            ]
            with self.changed:
                self.waiting += texts
                batch = self.take_batch()
                if self.waiting:
                    self.changed.notify()
            if batch:
                self.run(batch)

    def encode(self, jobs, model):
        """The texts of the jobs that want this model; none if that fails."""
        jobs = [job for job in jobs if job.model is model]
        try:
            encoded, cut = encode(model, [text for job in jobs for text in job.texts])
        except Exception as error:
            with self.changed:
                self.queued -= sum(len(job.texts) for job in jobs)
            self.fail(jobs, error)
            return []
        texts, start = [], 0
        for job in jobs:
            end = start + len(job.texts)
            job.cut = cut[start:end]
            job.probs = np.empty((len(job.texts), len(model.info.labels)), dtype=np.float32)
            texts += [Text(ids, job, i) for i, ids in enumerate(encoded[start:end])]
            start = end
        return texts

    def take_batch(self):
        """The next texts to run; whoever left or waited too long goes as well."""
        now, errors = time.monotonic(), {}
        for job in {text.job for text in self.waiting}:
            if job.error is None and job.gone():
                errors[job] = GoneError()
            elif job.error is None and now > job.deadline:
                errors[job] = LateError()
        for job, error in errors.items():
            self.fail([job], error)
        count = len(self.waiting)
        self.waiting = [text for text in self.waiting if text.job.error is None]
        self.queued -= count - len(self.waiting)
        if not self.waiting:
            return []
        first = self.waiting[0]
        order = [i for i, text in enumerate(self.waiting) if text.job.model is first.job.model]
        order.sort(key=lambda i: len(self.waiting[i].ids))
        lengths = [len(self.waiting[i].ids) for i in order]
        start, end = like_length(lengths, order.index(0), self.batch_size, self.pass_tokens)
        chosen = set(order[start:end])
        batch = [self.waiting[i] for i in order[start:end]]
        self.waiting = [text for i, text in enumerate(self.waiting) if i not in chosen]
        self.queued -= len(batch)
        return batch

    def run(self, batch):
        try:
            model = batch[0].job.model
            probs = metric.probabilities(model.forward(**utils.pad([text.ids for text in batch])))
        except Exception as error:
            return self.fail({text.job for text in batch}, error)
        self.on_batch(len(batch))
        done = []
        with self.changed:
            for text, row in zip(batch, probs):
                text.job.probs[text.index] = row
                text.job.missing -= 1
                if text.job.missing == 0:
                    done.append(text.job)
        self.settle(done)

    def fail(self, jobs, error):
        if not isinstance(error, GoneError | LateError):
            logger.error("the model failed: %r", error)
        for job in jobs:
            job.error = error
        self.settle(jobs)

    def settle(self, jobs):
        def settle_all():
            for job in jobs:
                job.settle()

        if jobs and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(settle_all)
