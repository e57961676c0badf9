"""Label a table of texts of any size with Apache Spark.

    spark-submit label.py --model_path_prefix ../../export/float32 --input texts.parquet \
        --text_column text --output labelled

Spark reads, distributes, retries and writes; the labels are those of ../predictor. All columns of
the input are kept, and only the texts pass through Python.
"""

import contextlib
import sys
import threading
import time
import uuid
import zipfile
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "predictor"))
import label_worker
from predictor import Predictor, bundle_folder

import utils
from utils import UserError, at_least, logger

pyspark = utils.LazyModule("pyspark")
sql = utils.LazyModule("pyspark.sql")
F = utils.LazyModule("pyspark.sql.functions")
errors = utils.LazyModule("pyspark.errors")
protocol = utils.LazyModule("py4j.protocol")

MODULES = "label_worker", "metric", "predictor", "utils"  # that executors import
FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
READ = {"csv": {"header": True, "escape": '"'}}  # quotes in a cell are doubled, as in RFC 4180
WRITE = {"csv": READ["csv"], "json": {"ignoreNullFields": False}}
BATCH_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
ROWS = 2048  # of an Arrow batch, which are sorted by length; more would hardly pad less


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    prefix = "path of the static graph without its suffix, e.g. export/float32"
    add("--model_path_prefix", required=True, help=prefix)
    shared = "the executors find the bundle under this path; without, it is sent to them"
    add("--shared_model", action="store_true", help=shared)
    add("--max_seq_length", type=at_least(3), help="longest sequence; None: the bundle's")
    add("--use_quantize", action="store_true", help="dynamic int8")
    add("--batch_size", type=at_least(1), default=32, help="texts per forward pass")
    utils.add_decision_flags(parser, "the bundle's")
    add = parser.add_argument_group("data").add_argument
    add("--input", required=True, nargs="+", help="files, folders or patterns that Spark can read")
    add("--input_format", help="parquet, json, csv, text or another of Spark's; None: by suffix")
    add("--input_options", nargs="+", default=[], metavar="KEY=VALUE", help="of Spark's reader")
    add("--text_column", default="text", help="the column to label")
    add("--partitions", type=at_least(1), help="tasks; None: Spark's splits, at least all cores")
    add("--output", required=True, help="folder of the result")
    add("--output_format", default="parquet", help="parquet, json, csv, text or another of Spark's")
    add("--output_options", nargs="+", default=[], metavar="KEY=VALUE", help="of Spark's writer")
    add("--output_scores", action="store_true", help="also write every label's probability")
    add("--column_prefix", default="", help="of the names of the new columns")
    add("--overwrite", action="store_true", help="delete an old result when the job starts")
    add("--logging_seconds", type=at_least(0.1), default=10.0, help="between lines of progress")
    args = parser.parse_args(argv)
    args.input_format = args.input_format or format_of(args.input)
    args.input_options = READ.get(args.input_format, {}) | options(args, "input_options")
    args.output_options = WRITE.get(args.output_format, {}) | options(args, "output_options")
    if args.output_scores and args.output_format == "text":
        raise UserError(
            "--output_scores: --output_format text holds texts and labels only; take parquet, "
            "json or csv"
        )
    return args


def format_of(paths):
    """Spark's name of the format that the suffixes of the paths tell; raises UserError."""
    found = {FORMATS[s] for path in paths for s in Path(path).suffixes if s in FORMATS}
    if len(found) != 1:
        raise UserError(
            f"--input {' '.join(paths)}: the suffixes do not name one format; give --input_format "
            "parquet, json, csv or text"
        )
    return found.pop()


def options(args, flag):
    for option in getattr(args, flag):
        if "=" not in option:
            raise UserError(f"--{flag} {option}: write KEY=VALUE, e.g. multiLine=true")
    return dict(option.split("=", 1) for option in getattr(args, flag))


def main(argv=None):
    args = parse_args(argv)
    settings = {
        "precision": "int8" if args.use_quantize else "fp32",
        "batch_size": args.batch_size,
        "max_seq_length": args.max_seq_length,
        "min_labels": args.min_labels,
        "max_labels": args.max_labels,
        "long_text": args.long_text,
    }
    # Finds every fault of the bundle before Spark starts, and makes a missing int8_model.onnx.
    predictor = Predictor(args.model_path_prefix, num_threads=1, **settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(spark_errors())
        spark = sql.SparkSession.getActiveSession()  # e.g. of a notebook
        if spark is None:
            spark = sql.SparkSession.builder.appName("label.py").getOrCreate()
            stack.callback(spark.stop)
        table = read_table(spark, args, predictor)
        check_output(spark, args, table)
        for name in MODULES:
            spark.sparkContext.addPyFile(sys.modules[name].__file__)
        archive = None
        if not args.shared_model:
            archive = send_bundle(spark, args.model_path_prefix, settings["precision"])
        totals = spark.sparkContext.accumulator(Counter(), label_worker.AddCounts)
        label = label_worker.labelling(archive, args.model_path_prefix, settings, totals)
        result, start = labelled(table, label, args, predictor.info), time.monotonic()
        with progress(spark, args.logging_seconds):
            writer = result.write.format(args.output_format).options(**args.output_options)
            writer.mode("overwrite" if args.overwrite else "errorifexists").save(args.output)
        report(predictor, totals.value, time.monotonic() - start)
        logger.info("Prediction results save in %s.", args.output)


@contextlib.contextmanager
def spark_errors():
    """Turns Spark's errors into one line; its log has the details."""
    try:
        yield
    except errors.PySparkException as error:
        raise UserError(f"Spark: {reason(str(error))}") from error
    except protocol.Py4JJavaError as error:
        causes = [error.java_exception]
        while causes[-1].getCause() is not None:
            causes.append(causes[-1].getCause())
        messages = [cause.toString() for cause in causes]
        if messages[-1].startswith("java.lang.ClassNotFoundException") and len(messages) > 1:
            messages.pop()  # the one before names the data source that is missing
        raise UserError(f"Spark: {reason(messages[-1])}") from error


def reason(message):
    """The line of an exception that says why; of a Python traceback in it the last one."""
    lines = message.split("\n\tat ")[0].strip().splitlines()
    return lines[-1 if any("Traceback" in line for line in lines) else 0]


def read_table(spark, args, predictor):
    """The input as a DataFrame; raises UserError if its columns do not fit."""
    if spark.conf.get(BATCH_ROWS) == "10000":  # Spark's default
        spark.conf.set(BATCH_ROWS, min(ROWS, predictor.chunk_size))
    table = spark.read.format(args.input_format).options(**args.input_options).load(args.input)
    if args.input_format == "text":
        table = table.withColumnRenamed("value", args.text_column)
    types = dict(table.dtypes)
    kind = types.get(args.text_column, f"no such column; there are: {', '.join(types)}")
    if kind != "string":
        raise UserError(f"--text_column {args.text_column}: {kind}; give one of strings")
    if args.output_format == "text":
        if len(types) > 1:
            raise UserError(
                f"--output_format text: it holds texts and labels only, the input has {len(types)} "
                "columns; take parquet, json or csv"
            )
        return table
    new = {(args.column_prefix + n).lower() for n in ("labels", "scores", "model_sha256", "result")}
    for name in types:
        if name.lower() in new:
            raise UserError(
                f"--input: it has a column {name} already; give the new columns another "
                "--column_prefix, e.g. new_"
            )
    return table


def check_output(spark, args, table):
    """Raises UserError if the output exists and is not to be replaced, or holds an input."""
    path = spark._jvm.org.apache.hadoop.fs.Path(args.output)
    system = path.getFileSystem(spark._jsc.hadoopConfiguration())
    if not system.exists(path):
        return
    if not args.overwrite:
        whole = system.exists(spark._jvm.org.apache.hadoop.fs.Path(path, "_SUCCESS"))
        state = "exists" if whole else "exists, left by a run that did not end"
        raise UserError(f"--output {args.output}: {state}; give another, or --overwrite")

    def address(uri):  # Spark and Hadoop write the same one in several ways
        parts = urlsplit(uri)
        return parts.scheme, parts.netloc, unquote(parts.path) + "/"

    *store, folder = address(system.makeQualified(path).toUri().toString())
    for uri in table.inputFiles():
        *where, file = address(uri)
        if where == store and file.startswith(folder):
            raise UserError(f"--output {args.output}: it holds the input {uri}; give another")


def send_bundle(spark, prefix, precision):
    """Gives every executor the files that a Predictor needs; returns the name of their archive."""
    source, name = bundle_folder(prefix), f"bundle-{uuid.uuid4()}"
    # Executors that start later read it, too: it goes where Spark deletes it when it stops.
    path = f"{pyspark.SparkFiles.getRootDirectory()}/{name}.zip"
    with zipfile.ZipFile(path, "w") as file:
        for part in (utils.CONFIG_FILE, utils.ONNX_FILES[precision], *utils.TOKENIZER_FILES):
            if (source / part).exists():
                file.write(source / part, part)
    spark.sparkContext.addArchive(f"{path}#{name}")
    return name


def labelled(table, label, args, info):
    """The table with the new columns; label: see label_worker.labelling."""
    cores = spark_cores = table.sparkSession.sparkContext.defaultParallelism
    if args.partitions or table.rdd.getNumPartitions() < cores:
        table = table.repartition(args.partitions or spark_cores)
    quoted = args.text_column.replace("`", "``")
    text = F.col(f"`{quoted}`")
    # Bytes, since a text that is not UTF-8 would end the task on its way to Python; one more than
    # are labelled shows that there are more.
    value = F.substring(text.cast("binary"), 1, utils.MAX_LINE + 1)
    result = args.column_prefix + "result"
    table = table.withColumn(result, label(value))
    labels, probs = F.col(f"`{result}`.labels"), F.col(f"`{result}`.probs")
    scores = F.map_from_arrays(F.array(*map(F.lit, info.labels)), probs)
    if args.output_format in ("csv", "text"):
        labels, scores = F.array_join(labels, ","), F.to_json(scores)
    if args.output_format == "text":  # lines that train.py and evaluate.py read
        line = F.translate(text, "\t\r\n", "   "), labels
        return table.select(F.concat_ws("\t", *(F.coalesce(part, F.lit("")) for part in line)))
    new = {"labels": labels, "scores": scores, "model_sha256": F.lit(info.model_sha256)}
    if not args.output_scores:
        del new["scores"]
    columns = {args.column_prefix + name: column for name, column in new.items()}
    return table.withColumns(columns).drop(result)


@contextlib.contextmanager
def progress(spark, seconds):
    """Until the block ends, logs every `seconds` what Spark says about its tasks."""
    tracker, done = spark.sparkContext.statusTracker(), threading.Event()

    def log():
        last = None
        while not done.wait(seconds):
            for stage in filter(None, map(tracker.getStageInfo, tracker.getActiveStageIds())):
                if stage != last:
                    message = "stage %d: %d of %d tasks done, %d running, %d attempts failed"
                    ready, running = stage.numCompletedTasks, stage.numActiveTasks
                    counts = ready, stage.numTasks, running, stage.numFailedTasks
                    logger.info(message, stage.stageId, *counts)
                last = stage

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def report(predictor, counts, seconds):
    """Logs what was labelled, and in a warning each what was hardly meant."""
    rows = counts["rows"]
    logger.info("%d rows in %.1f s, %.1f a second", rows, seconds, rows / seconds)
    for kind, what in (
        ("null", "have no text (null); they get no label"),
        ("empty", "have an empty text"),
        ("huge", f"are longer than {utils.MAX_LINE} bytes; the rest was not labelled"),
        ("not_utf8", "are not valid UTF-8; their labels are null"),
        ("failed", "made the model fail; their labels are null, the executors' logs say why"),
    ):
        if counts[kind]:
            logger.warning("%d of %d rows %s", counts[kind], rows, what)
    predictor.counts = {name: counts[name] for name in utils.COUNTS}
    predictor.log_doubts()


if __name__ == "__main__":
    utils.cli(main)
