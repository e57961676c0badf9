"""Label the texts of data.txt with a trained checkpoint.

    python predict.py --device cpu --dataset_dir data --params_path ./checkpoint

On the CPU the static graph runs (about four times as fast as dygraph), elsewhere dygraph.
Under `python -m paddle.distributed.launch` the ranks share the file; rank 0 merges their parts.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import contextlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
from tqdm import tqdm

import metric
import utils
from export_model import (
    dygraph_forward,
    load_checkpoint,
    local_size,
    save_static,
    set_device,
    static_forward,
)
from utils import UserError, logger


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", required=True, help="folder of the data and label files")
    add("--data_file", default="data.txt", help="texts, one per line")
    add("--label_file", help="checked against the checkpoint; None: label.txt if it exists")
    add("--output_file", default="output.txt", help="result; JSON lines if it ends in .jsonl")
    add("--output_scores", action="store_true", help="also write every label's probability")
    utils.add_inference_flags(parser, "./checkpoint/")
    utils.add_decision_flags(parser, "the checkpoint's")
    return parser.parse_args(argv)


def all_reduce(array):
    """Element-wise sum of a NumPy array over all ranks."""
    if dist.get_world_size() == 1:
        return array
    tensor = paddle.to_tensor(array)
    dist.all_reduce(tensor)
    return tensor.numpy()


def fast_forward(model, device):
    """The faster forward of a model: static graph on the CPU, else dygraph."""
    if device != "cpu":
        return dygraph_forward(model)
    with tempfile.TemporaryDirectory() as folder:
        save_static(model, Path(folder) / "model")
        return static_forward(Path(folder) / "model")


def load_forward(params_path, device):
    """Returns (forward, utils.ModelInfo) of a checkpoint."""
    set_device(device)
    model, info = load_checkpoint(params_path)
    return fast_forward(model, device), info


def merge_parts(file, parts, size, header_lines):
    """Takes chunks of `size` lines from the parts in turn, the header first.

    Rank r wrote the chunks r, r + world size, ...
    """
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(open(p, encoding="utf-8", newline="\n")) for p in parts]
        file.writelines(itertools.islice(handles[0], header_lines))
        for handle in itertools.cycle(handles):
            lines = list(itertools.islice(handle, size))
            file.writelines(lines)
            if len(lines) < size:  # only the last chunk is short
                break


def remove(paths):
    for path in paths:
        path.unlink(missing_ok=True)


def main(argv=None):
    args = parse_args(argv)
    set_device(args.device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data_path = Path(args.dataset_dir) / args.data_file
    next(utils.read_texts(data_path))  # a wrong path should not cost the loading of the model
    output = utils.check_writable(args.output_file)
    if world_size != local_size():
        raise UserError("predict.py shares a file on one machine; split it for several machines")
    if world_size > 1:
        dist.init_parallel_env()
    forward, info = load_forward(args.params_path, args.device)
    info, labels = info.with_limits(args.min_labels, args.max_labels), info.labels
    utils.check_labels(args.dataset_dir, args.label_file, labels)
    max_seq_length = args.max_seq_length or info.max_seq_length
    utils.check_length(max_seq_length, info.max_position)
    tokenizer = utils.load_tokenizer(args.params_path)
    jsonl = output.suffix == ".jsonl"
    # Every rank writes its chunks beside the output; rank 0 merges them when all are there.
    parts = [output.with_name(f".{output.name}.part{i}.tmp") for i in range(world_size)]
    chunk = utils.chunk_size(len(labels))
    sizes = np.zeros(2, dtype=np.int64)  # texts, texts that were cut
    try:
        with utils.atomic_file(output if world_size == 1 else parts[rank]) as file:
            if rank == 0:
                utils.write_header(file, labels, jsonl, args.output_scores)
            chunks = utils.chunks(utils.read_texts(data_path), chunk)
            for number, texts in enumerate(tqdm(chunks, unit="chunk", disable=None)):
                if number % world_size != rank:
                    continue
                encoded, cut = utils.encode(texts, tokenizer, max_seq_length, args.long_text)
                sizes += len(texts), cut
                logits = utils.logits_of(forward, encoded, args.batch_size, len(labels))
                probs = metric.probabilities(logits)
                names = metric.label_names(metric.decode(probs, **info.rule), labels)
                scores = probs if args.output_scores else None
                utils.write_rows(file, texts, names, labels, jsonl, scores)
        sizes = all_reduce(sizes)  # all parts are complete now
        if rank == 0 and world_size > 1:
            with utils.atomic_file(output) as file:
                merge_parts(file, parts, chunk, header_lines=0 if jsonl else 1)
            remove(parts)
    except BaseException:
        remove(parts if rank == 0 else [parts[rank]])
        raise
    if rank == 0:
        utils.warn_truncated(sizes[1], sizes[0], max_seq_length, args.long_text)
        logger.info("Prediction results save in %s.", args.output_file)


if __name__ == "__main__":
    utils.cli(main)
