"""Prune a fine-tuned checkpoint to a fraction of its width.

    python prune.py --device cpu --dataset_dir data --params_dir ./checkpoint --output_dir ./prune \
        --width_mult 2/3 1/2

Each width ends in its own folder, e.g. prune/0.6666666666666666: dynamic weights for predict.py and
the exported bundle for deployments. The method is in prune_trainer.py.
"""

import argparse
import contextlib
import shutil
from fractions import Fraction
from pathlib import Path

import utils
from utils import UserError, at_least, logger

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")


def parse_args(argv=None):
    """The flags of PaddleNLP's TrainingArguments that have an effect here, and our own."""
    parser = utils.new_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument_group("data and model").add_argument
    add("--dataset_dir", required=True, help="has train.txt, dev.txt, label.txt")
    add("--params_dir", default="./checkpoint/", help="fine-tuned checkpoint")
    add("--output_dir", required=True, help="folder of the pruned models")
    add("--max_seq_length", type=at_least(3), default=128, help="longest sequence in tokens")
    add("--cache_dir", help="keep the encoded texts there for other runs; None: they are removed")

    add = parser.add_argument_group("pruning").add_argument
    add(
        "--width_mult",
        nargs="+",
        action="extend",
        type=parse_width,
        default=argparse.SUPPRESS,
        help="kept fraction(s) of heads and feed-forward neurons (default: 2/3)",
    )
    add(
        "--distill_loss",
        choices=["sigmoid", "softmax"],
        default="sigmoid",
        help="of the logits: per label or softmax",
    )
    add("--gold_weight", type=at_least(0.0), default=0.0, help="share of the gold labels, 0 to 1")

    add = parser.add_argument_group("training").add_argument
    add("--device", type=str.lower, default="gpu", help="cpu, gpu, gpu:0, xpu or npu")
    add("--per_device_train_batch_size", type=at_least(1), default=32, help="texts per step")
    add("--per_device_eval_batch_size", type=at_least(1), default=32, help="texts per dev batch")
    add("--learning_rate", type=at_least(0.0), default=3e-5, help="peak, then linear decay")
    add("--num_train_epochs", type=at_least(0.0), default=10.0, help="passes over the train set")
    add("--max_steps", type=int, default=-1, help="steps instead of epochs; -1: epochs count")
    add("--warmup_steps", type=at_least(0), default=0, help="steps of the warm-up")
    add("--warmup_ratio", type=at_least(0.0), default=0.0, help="the same as a share of all steps")
    add("--weight_decay", type=at_least(0.0), default=0.0, help="AdamW weight decay")
    add("--max_grad_norm", type=at_least(0.0), default=1.0, help="clip gradients to it; 0: off")
    add("--logging_steps", type=at_least(1), default=5, help="steps between log lines")
    add(
        "--save_steps",
        type=at_least(1),
        default=100,
        help="steps between evaluations; also after each epoch",
    )
    add("--seed", type=at_least(0), default=3, help="seed of all randomness")

    args, others = parser.parse_known_args(argv)
    if others and others[0].startswith("-"):
        raise UserError(f"{others[0]}: unknown, or without effect on pruning; see --help")
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.num_train_epochs == 0 and args.max_steps <= 0:
        raise UserError("--num_train_epochs 0 is not a number above 0")
    if args.gold_weight > 1:
        raise UserError(f"--gold_weight {args.gold_weight} is not between 0 and 1")
    args.width_mult = list(dict.fromkeys(getattr(args, "width_mult", [Fraction(2, 3)])))
    return args


def main(argv=None):
    args = parse_args(argv)
    info = utils.read_model_info(args.params_dir)
    utils.check_length(args.max_seq_length, info.max_position)
    config = utils.read_json(Path(args.params_dir) / utils.CONFIG_FILE)
    if "width_mult" in config:
        raise UserError(f"{args.params_dir}: pruned already; give the checkpoint of full width")
    check_widths(args.width_mult, config["num_attention_heads"])
    model.set_device(args.device)
    try:
        from prune_trainer import Pruner
    except ModuleNotFoundError as error:  # paddleslim, or what it imports
        hint = "please install paddleslim==2.6.0"
        raise UserError(f"Cannot import paddleslim, {hint} ({error})") from error
    rank, _ = model.init_processes()
    if rank > 0:
        logger.setLevel("WARNING")  # every rank would say the same
    if args.max_seq_length < info.max_seq_length:
        message = "--max_seq_length %d, but the checkpoint was trained with %d"
        logger.warning(message, args.max_seq_length, info.max_seq_length)
    if info.thresholds is not None:
        logger.warning("The thresholds were tuned for the teacher; tune the students' anew")
    with contextlib.ExitStack() as stack:
        model.on_rank_0(lock_targets, args, stack)
        labels = read_labels(args, info)
        train_set, dev_set = read_data(args, labels, stack)
        teacher, _ = model.load_checkpoint(args.params_dir, labels)
        paddle.seed(args.seed)
        logger.info("Pruning starts.")
        pruner = Pruner(args, teacher, labels, train_set, dev_set)
        for width in args.width_mult:
            pruner.prune(width)


def parse_width(text):
    """'2/3' or '0.75' as a Fraction between 0 and 1; raises UserError for anything else."""
    try:
        width = Fraction(text.strip().strip("'\""))
    except (ValueError, ZeroDivisionError):
        width = Fraction(0)
    if not 0 < width <= 1:
        raise UserError(f"--width_mult {text}: give a fraction such as 2/3, above 0 and at most 1")
    return width


def check_widths(widths, num_heads):
    """Attention can only keep whole heads."""
    for width in widths:
        if (width * num_heads).denominator != 1:
            fitting = ", ".join(str(Fraction(n, num_heads)) for n in range(1, num_heads))
            raise UserError(
                f"--width_mult {width} does not keep a whole number of the {num_heads} heads; "
                f"widths that fit: {fitting}"
            )


def target_folder(args, width):
    return Path(args.output_dir) / str(float(width))


def lock_targets(args, stack):
    """The folders of all widths can be written, none is the teacher's, and no other run writes to
    them until `stack` is closed. Raises UserError."""
    for width in args.width_mult:
        target = target_folder(args, width)
        if target.resolve() == Path(args.params_dir).resolve():
            raise UserError(f"--output_dir: {target} is the checkpoint itself; give another folder")
        stack.enter_context(utils.run_lock("--output_dir", target, "pruning"))
        if (target / utils.CONFIG_FILE).exists():
            logger.warning("%s holds a model; the new one will replace it", target)
        with utils.atomic_folder(target):
            pass  # nothing changes, but an error shows now and not after the first evaluation


def read_labels(args, info):
    """The teacher's labels in the order of label.txt, if there is one; raises UserError if that
    holds others."""
    path = Path(args.dataset_dir) / "label.txt"
    if not path.exists():
        return info.labels
    labels, config = utils.read_labels(path), Path(args.params_dir) / utils.CONFIG_FILE
    advice = "give the label file that it was trained with"
    model.check_same_labels(path, labels, info.labels, config, advice)
    return labels


def read_data(args, labels, stack):
    """(train, dev), see utils.EncodedSet; without --cache_dir they go when `stack` is closed."""
    data, cache = Path(args.dataset_dir), args.cache_dir
    if cache is None:
        cache = target_folder(args, args.width_mult[0]) / utils.CACHE_FOLDER
        if model.local_rank() == 0:
            stack.callback(shutil.rmtree, cache, ignore_errors=True)
    files = [data / "train.txt", data / "dev.txt"]
    tokenizer = utils.load_tokenizer(args.params_dir)
    sets = model.read_sets(files, labels, tokenizer, args.max_seq_length, cache)
    for part in sets:
        utils.log_truncation(part.cut, len(part[0]), args.max_seq_length)
    return sets


if __name__ == "__main__":
    utils.cli(main)
