"""A Spark application of two executors, each a JVM of its own, for test_spark.py.

    spark-submit spark_app.py FOLDER

makes FOLDER/types.parquet and FOLDER/hard.parquet from FOLDER/texts.json, runs label.py for each
entry of FOLDER/steps.json, and writes FOLDER/results.json: its exit status and messages, and what
was killed in the middle.
"""

import contextlib
import datetime
import decimal
import io
import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

LABEL = Path(__file__).resolve().parent.parent / "deploy" / "spark" / "label.py"


def as_utf8(values):
    """A column of strings from bytes that need not be UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def make_tables(folder):
    texts = json.loads((folder / "texts.json").read_text("utf-8"))
    ids = range(len(texts))
    late = datetime.datetime(2900, 1, 1, 12, tzinfo=datetime.timezone.utc)
    columns = {
        "id": pa.array(ids, pa.int64()),
        "正文 `a.b`": pa.array(texts),
        "big": pa.array([2**63 - 1 - i if i % 3 else None for i in ids], pa.int64()),
        "exact": pa.array([decimal.Decimal(i).scaleb(-3) for i in ids], pa.decimal128(20, 3)),
        "late": pa.array([late + datetime.timedelta(i) for i in ids], pa.timestamp("us", "UTC")),
        "nested": pa.array([[{"a": i, "b": [None, str(i)]}] * (i % 3) for i in ids]),
        "bytes": pa.array([bytes([i % 256]) for i in ids]),
        "broken": as_utf8([b"\xff\xfe"] * len(texts)),
    }
    pq.write_table(pa.table(columns), folder / "types.parquet")
    hard = {"id": pa.array(range(6)), "text": None}
    long = texts[0].encode() + b" " * 499_999
    hard["text"] = as_utf8([None, b"", b"\xe5\xa9", long, texts[1].encode(), b"ok\xff"])
    pq.write_table(pa.table(hard), folder / "hard.parquet")


def same_columns(folder, output):
    """Whether a result has all columns of types.parquet as they were, beside the new ones."""
    given, found = (
        pq.read_table(folder / name, coerce_int96_timestamp_unit="us").sort_by("id")
        for name in ("types.parquet", output)
    )
    binary = [f.with_type(pa.binary()) if f.name == "broken" else f for f in given.schema]
    names = given.column_names
    given, found = (table.select(names).cast(pa.schema(binary)) for table in (given, found))
    return given.equals(found)


# --------------------------------------------------------------------------------------- killing
def processes():
    """{process: (parent, command)} of this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            found[int(path.name)] = int(parent), command
    return found


def victims(kind, application):
    """The JVMs of this application's executors, or their Python workers."""
    table = processes()
    executors = [p for p, (_, c) in table.items() if application in c and "--executor-id" in c]
    if kind == "executor":
        return executors
    daemons = [p for p, (parent, _) in table.items() if parent in executors]
    return [p for p, (parent, _) in table.items() if parent in daemons]


def kill_in_the_middle(context, kind, stop, killed):
    """Kills an executor, or all Python workers, while both are busy and other tasks wait."""
    tracker = context.statusTracker()
    while not stop.wait(0.01):
        for stage in filter(None, map(tracker.getStageInfo, tracker.getActiveStageIds())):
            waiting = stage.numTasks - stage.numCompletedTasks - stage.numActiveTasks
            if stage.numCompletedTasks and stage.numActiveTasks >= 2 and waiting:
                found = victims(kind, context.applicationId)
                for process in found[:1] if kind == "executor" else found:
                    os.kill(process, signal.SIGKILL)
                killed.append(stage.stageId)
                return


def run(context, step):
    """label.py as a script in this application."""
    stop, killed, log = threading.Event(), [], io.StringIO()
    killer = threading.Thread(
        target=kill_in_the_middle, args=(context, step.get("kill"), stop, killed)
    )
    if step.get("kill"):
        killer.start()
    sys.argv, status, start = [str(LABEL), *step["argv"]], 0, time.monotonic()
    try:
        with contextlib.redirect_stderr(log):
            runpy.run_path(str(LABEL), run_name="__main__")
    except SystemExit as error:
        status = error.code
    finally:
        stop.set()
    result = {"status": status, "log": log.getvalue(), "seconds": time.monotonic() - start}
    if step.get("kill"):
        killer.join()
        result["killed"] = killed
    return result


def main():
    folder = Path(sys.argv[1])
    os.chdir(folder)
    sys.path.insert(0, str(LABEL.parent))  # as in `spark-submit label.py`
    make_tables(folder)
    session = SparkSession.builder.getOrCreate()
    results = []
    for step in json.loads((folder / "steps.json").read_text("utf-8")):
        results.append(run(session.sparkContext, step))
        if step.get("compare"):
            results[-1]["same_columns"] = same_columns(folder, step["compare"])
            rows = pq.read_table(folder / step["compare"]).sort_by("id")
            rows = rows.select(["labels", "scores", "model_sha256"]).to_pylist()
            results[-1]["rows"] = rows
        if step.get("keep"):
            shutil.copytree(*step["keep"])
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    session.stop()


if __name__ == "__main__":
    main()
