"""What runs in the Python workers of Spark's executors: a column of texts to labels.

label.py sends this file, ../predictor/predictor.py, utils.py and metric.py to them.
"""

import codecs
import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import utils  # isort: skip  before predictor, which looks for it in a folder above its own first
from predictor import Predictor

RESULT = "labels array<string>, probs array<float>"


class AddCounts:
    """How Spark adds Counters (a pyspark.AccumulatorParam). They are exact: Spark counts the tasks
    that write a result once each, whatever is retried ("Accumulators" in its RDD guide)."""

    @staticmethod
    def zero(_):
        return Counter()

    @staticmethod
    def addInPlace(counts, more):
        counts.update(more)
        return counts


def labelling(archive, prefix, settings, totals):
    """The column function that labels texts in UTF-8, a pandas UDF from binary to RESULT.

    archive: see model_prefix. settings: of predictor_of. totals: an accumulator of the counts of
    label_values.
    """
    import pandas
    from pyspark import TaskContext
    from pyspark.sql import functions

    def label(batches: Iterator[pandas.Series]) -> Iterator[pandas.DataFrame]:
        threads = TaskContext.get().cpus()
        predictor = predictor_of(model_prefix(archive, prefix), threads, **settings)
        for values in batches:
            labels, probs, counts = label_values(predictor, values.tolist())
            totals.add(counts)
            yield pandas.DataFrame({"labels": labels, "probs": probs})

    return functions.pandas_udf(label, RESULT).asNondeterministic()  # so that it runs once a row


def model_prefix(archive, prefix):
    """Where this executor has the static graph: in an archive that Spark unpacked, or as given."""
    from pyspark import SparkFiles

    return f"{SparkFiles.get(archive)}/{Path(prefix).name}" if archive else prefix


@functools.lru_cache(maxsize=1)
def predictor_of(prefix, num_threads, **settings):
    """The predictor of this Python worker, which labels the texts of one task after the other.

    Raises UserError, which fails the task, if the model is not there or cannot label anything.
    """
    # Read when the tokenizers are first used: a task has no more threads than cores.
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    predictor = Predictor(prefix, num_threads=num_threads, **settings)
    predictor.predict([""])  # what fails from now on is due to a text
    return predictor


def label_values(predictor, values):
    """Labels UTF-8 texts, a list of bytes or None.

    Returns (label names, probabilities, counts): per value a list of str and float32 [classes], and
    a Counter. None gets no label and None for the probabilities; what is not UTF-8, or fails in
    another way, gets None for both.
    """
    labels, probs, counts = [None] * len(values), [None] * len(values), Counter(rows=len(values))
    rows, texts = [], []
    for row, value in enumerate(values):
        if value is None:
            labels[row] = []
            counts["null"] += 1
            continue
        whole = len(value) <= utils.MAX_LINE
        counts["huge"] += not whole
        try:  # of a longer one an incomplete last character is dropped
            text, _ = codecs.utf_8_decode(value[: utils.MAX_LINE], "strict", whole)
        except UnicodeDecodeError:
            counts["not_utf8"] += 1
            continue
        counts["empty"] += not text
        rows.append(row)
        texts.append(text)
    for row, result in zip(rows, _label_texts(predictor, texts, counts)):
        labels[row], probs[row] = result
    return labels, probs, counts


def _label_texts(predictor, texts, counts):
    """A list of (label names, probabilities); if a batch fails, only the texts that cause it do."""
    results = []
    try:
        for _, decisions, probs in predictor.stream(texts):
            results += zip(predictor.names(decisions), probs)
    except Exception as error:  # of a library, on a text that nobody thought of
        if len(texts) > 1:
            middle = len(texts) // 2
            parts = texts[:middle], texts[middle:]
            return [result for part in parts for result in _label_texts(predictor, part, counts)]
        utils.logger.warning("a text cannot be labelled: %r", error)
        counts["failed"] += 1
        return [(None, None)]
    counts.update(predictor.counts)
    return results
