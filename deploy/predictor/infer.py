"""Label texts, or measure accuracy and speed, with ONNX Runtime.

    python infer.py --device cpu --model_path_prefix ../../export/float32 --dataset_dir ../../data
    python infer.py --device cpu --model_path_prefix ../../export/float32 --dataset_dir ../../data \
        --use_quantize --perf

Texts are streamed: memory does not grow with the file, and `--data_file /dev/stdin` labels a pipe.
"""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
from predictor import Predictor, bundle_folder, check_device

import metric
import utils
from utils import UserError, at_least, logger

WARM_UP = 5  # batches before the clock starts, the longest of the data


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    prefix = "path of the static graph without its suffix, e.g. export/float32"
    add("--model_path_prefix", required=True, help=prefix)
    add("--model_name_or_path", help="folder of another tokenizer; None: the bundle's")
    add("--max_seq_length", type=at_least(3), help="longest sequence; None: the bundle's")
    add = parser.add_argument_group("device").add_argument
    add("--device", choices=["cpu", "gpu"], default="gpu", help="where to run")
    add("--device_id", type=at_least(0), default=0, help="number of the GPU")
    add("--use_fp16", action="store_true", help="half precision (GPU only)")
    add("--use_quantize", action="store_true", help="dynamic int8 (CPU only)")
    add("--num_threads", type=at_least(1), help="CPU threads; None: one per core")
    add("--batch_size", type=at_least(1), default=32, help="texts per forward pass")
    utils.add_decision_flags(parser, "the bundle's")
    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--data_file", default="data.txt", help="texts to label, one per line")
    add("--label_file", help="checked against the bundle; None: label.txt if it exists")
    add("--output_file", help="write the labels there (.jsonl: JSON lines); None: print them")
    add("--output_scores", action="store_true", help="also write every label's probability")
    add("--perf", action="store_true", help="measure F1 and speed instead of labelling")
    add("--perf_dataset", choices=["dev", "test"], default="dev", help="the set that --perf uses")
    args = parser.parse_args(argv)
    if args.use_fp16 and args.device != "gpu":
        raise UserError("--use_fp16 needs --device gpu; on the CPU use --use_quantize")
    if args.use_quantize and args.device != "cpu":
        raise UserError("--use_quantize needs --device cpu; on the GPU use --use_fp16")
    if args.output_scores and not args.output_file:
        raise UserError("--output_scores needs --output_file")
    if args.perf and args.output_file:
        raise UserError("--perf measures and writes no labels; leave out --output_file")
    if args.model_name_or_path and not Path(args.model_name_or_path).is_dir():
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path}: no such folder; leave it out, the "
            "bundle has its tokenizer"
        )
    return args


def new_predictor(args):
    return Predictor(
        args.model_path_prefix,
        device=args.device,
        precision="fp16" if args.use_fp16 else "int8" if args.use_quantize else "fp32",
        device_id=args.device_id,
        num_threads=args.num_threads,
        batch_size=args.batch_size,
        max_seq_length=args.max_seq_length,
        tokenizer_path=args.model_name_or_path,
        min_labels=args.min_labels,
        max_labels=args.max_labels,
        long_text=args.long_text,
    )


def perf(predictor, texts, label_ids):
    """F1 and speed from one pass; returns them as a dict (milliseconds and texts per second)."""
    seconds, tokenise_seconds, total_cut = [], 0.0, 0
    num_labels = len(predictor.info.labels)
    counts, size = metric.MultiLabelCounts(num_labels), utils.chunk_size(num_labels)

    def timed_forward(**batch):
        start = time.perf_counter()
        logits = predictor.forward(**batch)
        seconds.append(time.perf_counter() - start)
        return logits

    for rows in (slice(start, start + size) for start in range(0, len(texts), size)):
        start = time.perf_counter()
        encoded, cut = predictor.encode(texts[rows])
        tokenise_seconds, total_cut = (
            tokenise_seconds + time.perf_counter() - start,
            total_cut + cut,
        )
        warm_up = utils.run_batches(predictor.forward, encoded, predictor.batch_size)
        for _ in itertools.islice(warm_up, 0 if seconds else WARM_UP):
            pass
        logits = utils.logits_of(timed_forward, encoded, predictor.batch_size, num_labels)
        decisions = metric.decode(metric.probabilities(logits), **predictor.info.rule)
        counts.update(decisions, utils.multi_hot(label_ids[rows], num_labels))
    utils.warn_truncated(total_cut, len(texts), predictor.max_seq_length, predictor.long_text)
    total = sum(seconds)
    p50, p99 = 1000 * np.percentile(seconds, [50, 99])
    return {
        "micro_f1": 100 * counts.micro_f1,
        "macro_f1": 100 * counts.macro_f1,
        "texts": len(texts),
        "seconds": total,
        "latency_ms": 1000 * total / len(texts),
        "texts_per_second": len(texts) / total,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "tokenise_ms": 1000 * tokenise_seconds / len(texts),
    }


def print_perf(result, batch_size):
    print("micro f1: {micro_f1:.2f}, macro f1: {macro_f1:.2f}".format(**result))
    line = "sample nums: {texts}, time: {seconds:.2f}, latency: {latency_ms:.2f} ms"
    print(line.format(**result))
    line = "p50: {p50_ms:.2f} ms, p99: {p99_ms:.2f} ms per batch of {batch_size}, "
    line += "{texts_per_second:.1f} texts/s, tokenisation apart: {tokenise_ms:.3f} ms per text"
    print(line.format(**result, batch_size=batch_size))


def predict(predictor, texts):
    """Yields (texts, label names, probabilities) of one chunk after the other."""
    total = total_cut = 0
    for chunk in utils.chunks(texts, utils.chunk_size(len(predictor.info.labels))):
        encoded, cut = predictor.encode(chunk)
        total, total_cut = total + len(chunk), total_cut + cut
        yield chunk, *predictor.decode(predictor.logits(encoded))
    utils.warn_truncated(total_cut, total, predictor.max_seq_length, predictor.long_text)


def write_labels(predictor, texts, output_file, output_scores):
    jsonl, labels = output_file.suffix == ".jsonl", predictor.info.labels
    with utils.atomic_file(output_file) as file:
        utils.write_header(file, labels, jsonl, output_scores)
        for chunk, names, probs in predict(predictor, texts):
            utils.write_rows(file, chunk, names, labels, jsonl, probs if output_scores else None)


def print_labels(predictor, texts):
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    for chunk, names, _ in predict(predictor, texts):
        for text, names in zip(chunk, names):
            print(f"input data: {text}")
            print(f"labels: {','.join(names)}")
            print("----------------------------", flush=True)


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    data = Path(args.dataset_dir)
    info = utils.read_model_info(bundle_folder(args.model_path_prefix))
    utils.check_labels(data, args.label_file, info.labels)
    if args.perf:
        examples = utils.read_examples(data / f"{args.perf_dataset}.txt", info.labels)
        print_perf(perf(new_predictor(args), *examples), args.batch_size)
        return
    texts = utils.read_texts(data / args.data_file)
    texts = itertools.chain([next(texts)], texts)  # a wrong path shows before the model is loaded
    output_file = utils.check_writable(args.output_file) if args.output_file else None
    predictor = new_predictor(args)
    if output_file is None:
        print_labels(predictor, texts)
        return
    write_labels(predictor, texts, output_file, args.output_scores)
    logger.info("Prediction results save in %s.", args.output_file)


if __name__ == "__main__":
    utils.cli(main)
