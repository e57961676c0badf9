"""Label texts, or measure accuracy and speed, with ONNX Runtime.

    python infer.py --device cpu --model_path_prefix ../../export/float32 --dataset_dir ../../data
    python infer.py --device cpu --model_path_prefix ../../export/float32 --dataset_dir ../../data \
        --use_quantize --perf

Texts are streamed: memory does not grow with the file, and `--data_file /dev/stdin` labels a pipe.
"""

import itertools
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
    encode, tokenise_seconds = timed(predictor.encode)
    forward, seconds = timed(predictor.forward)
    # The longest texts first, as in the pass that is measured.
    warm_up = utils.run_batches(
        predictor.forward, encode(texts[: predictor.chunk_size]), predictor.batch_size
    )
    for _ in itertools.islice(warm_up, WARM_UP):
        pass
    tokenise_seconds.clear()
    predictor.encode, predictor.forward = encode, forward
    counts, start = metric.MultiLabelCounts(len(predictor.info.labels)), 0
    for chunk, decisions, _ in predictor.stream(texts):
        gold = label_ids[start : start + len(chunk)]
        counts.update(decisions, utils.multi_hot(gold, len(predictor.info.labels)))
        start += len(chunk)
    predictor.log_truncation()
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
        "tokenise_ms": 1000 * sum(tokenise_seconds) / len(texts),
    }


def timed(function):
    """Returns (the same function, list of the seconds that its calls take)."""
    seconds = []

    def measured(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return measured, seconds


def print_perf(result, batch_size):
    print("micro f1: {micro_f1:.2f}, macro f1: {macro_f1:.2f}".format(**result))
    line = "sample nums: {texts}, time: {seconds:.2f}, latency: {latency_ms:.2f} ms"
    print(line.format(**result))
    line = "p50: {p50_ms:.2f} ms, p99: {p99_ms:.2f} ms per batch of {batch_size}, "
    line += "{texts_per_second:.1f} texts/s, tokenisation apart: {tokenise_ms:.3f} ms per text"
    print(line.format(**result, batch_size=batch_size))


def print_labels(predictor, texts):
    for chunk, decisions, _ in predictor.stream(texts):
        for text, names in zip(chunk, predictor.names(decisions)):
            print(f"input data: {utils.cell(text)}")
            print(f"labels: {','.join(names)}")
            print("----------------------------", flush=True)


def main(argv=None):
    args = parse_args(argv)
    check_device(args.device)
    data, folder = Path(args.dataset_dir), bundle_folder(args.model_path_prefix)
    labels = utils.read_model_info(folder).labels
    utils.check_labels(data, args.label_file, labels)
    if args.perf:
        examples = utils.read_examples(data / f"{args.perf_dataset}.txt", labels)
        print_perf(perf(new_predictor(args), *examples), args.batch_size)
        return
    if args.output_file:
        inputs = [data / args.data_file, data / (args.label_file or "label.txt")]
        inputs += utils.model_files(folder) + list(folder.glob("*.onnx"))
        inputs += utils.model_files(args.model_name_or_path or folder)
        suffixes = *utils.GRAPH_SUFFIXES, ".pdiparams"
        inputs += [Path(f"{args.model_path_prefix}{suffix}") for suffix in suffixes]
        utils.check_outputs([args.output_file], inputs)
    texts = utils.peeked(utils.read_texts(data / args.data_file))
    predictor = new_predictor(args)
    if args.output_file:
        with utils.atomic_file(args.output_file) as file:
            jsonl = Path(args.output_file).suffix == ".jsonl"
            predictor.write(file, texts, jsonl, args.output_scores)
        logger.info("Prediction results save in %s.", args.output_file)
    else:
        print_labels(predictor, texts)
    predictor.log_doubts()


if __name__ == "__main__":
    utils.cli(main)
