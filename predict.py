"""Label the texts of data.txt with a trained checkpoint.

    python predict.py --device cpu --dataset_dir data --params_path ./checkpoint

On the CPU the static graph runs (about four times as fast as dygraph), elsewhere dygraph.
Under `python -m paddle.distributed.launch` the ranks share the file; rank 0 merges their parts.
"""

import contextlib
import itertools
from pathlib import Path

import numpy as np

import utils
from utils import UserError, logger

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")


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


def main(argv=None):
    args = parse_args(argv)
    # What can be wrong shows before the model is loaded, which takes seconds.
    info = utils.read_model_info(args.params_path)
    limits = {"min_labels": args.min_labels, "max_labels": args.max_labels}
    info = info.with_settings(args.max_seq_length, **limits)
    utils.check_labels(args.dataset_dir, args.label_file, info.labels)
    data_path, output = Path(args.dataset_dir) / args.data_file, Path(args.output_file)
    label_path = Path(args.dataset_dir) / (args.label_file or "label.txt")
    inputs = [data_path, label_path, *utils.model_files(args.params_path)]
    utils.check_outputs([output], inputs)
    texts = utils.read_texts(data_path)
    if not data_path.is_fifo():
        texts = utils.peeked(texts)
    model.set_device(args.device)
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    if world_size > 1:
        if world_size != model.local_size():
            raise UserError(
                "predict.py shares a file on one machine; split it for several machines"
            )
        if not data_path.is_file():
            raise UserError(f"{data_path}: several processes cannot share a pipe; give a file")
        model.init_processes()
    if rank > 0:
        logger.setLevel("ERROR")  # every rank would warn of the same
    settings = {"batch_size": args.batch_size, "long_text": args.long_text}
    labeller = model.load_labeller(args.params_path, args.device, info, **settings)
    jsonl = output.suffix == ".jsonl"
    if world_size == 1:
        with utils.atomic_file(output) as file:
            labeller.write(file, texts, jsonl, args.output_scores)
    else:
        write_in_parts(args, labeller, texts, output, jsonl)
    if rank == 0:
        labeller.log_doubts()
        logger.info("Prediction results save in %s.", args.output_file)


def write_in_parts(args, labeller, texts, output, jsonl):
    """Every rank writes its chunks beside the output; rank 0 merges them when all are there."""
    rank, world_size = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    parts = [output.with_name(f".{output.name}.part{i}.tmp") for i in range(world_size)]
    try:
        with utils.atomic_file(parts[rank]) as file:
            labeller.write(file, texts, jsonl, args.output_scores, rank, world_size)
        counts = model.all_reduce(np.array([*labeller.counts.values()]))
        labeller.counts = dict(zip(labeller.counts, counts.tolist()))
        # All parts are complete now.
        if rank == 0:
            with utils.atomic_file(output) as file:
                merge_parts(file, parts, labeller.chunk_size, header_lines=0 if jsonl else 1)
    finally:
        if rank == 0:
            for part in parts:
                part.unlink(missing_ok=True)


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


if __name__ == "__main__":
    utils.cli(main)
