"""Prune a fine-tuned checkpoint to a fraction of its width.

    python prune.py --device cpu --dataset_dir data --params_dir ./checkpoint --output_dir ./prune \
        --width_mult 2/3 1/2

Each width ends in its own folder, e.g. prune/0.6666666666666666: dynamic weights for predict.py and
the exported bundle for deployments. The method is in prune_trainer.py.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import argparse
import sys
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import List  # noqa: UP035  PdArgumentParser reads this form

import paddle
import paddle.distributed as dist
from paddlenlp import trainer

import utils
from export_model import load_checkpoint, set_device
from utils import UserError, logger

# Of PaddleNLP's TrainingArguments, those that have an effect here.
SUPPORTED = {
    "output_dir",
    "device",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
    "save_steps",
    "seed",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "warmup_ratio",
}


@dataclass
class TrainingArguments(trainer.TrainingArguments):
    device: str = field(default="gpu", metadata={"help": "cpu, gpu, gpu:0, xpu or npu"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "texts per step"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "texts per dev batch"})
    learning_rate: float = field(default=3e-5, metadata={"help": "peak, then linear decay"})
    num_train_epochs: float = field(default=10.0, metadata={"help": "passes over the train set"})
    logging_steps: int = field(default=5, metadata={"help": "steps between log lines"})
    save_steps: int = field(
        default=100, metadata={"help": "steps between evaluations; also after each epoch"}
    )
    seed: int = field(default=3, metadata={"help": "seed of all randomness"})


@dataclass
class DataArguments:
    dataset_dir: str = field(default=None, metadata={"help": "has train.txt, dev.txt, label.txt"})
    max_seq_length: int = field(default=128, metadata={"help": "longest sequence in tokens"})


@dataclass
class ModelArguments:
    params_dir: str = field(default="./checkpoint/", metadata={"help": "fine-tuned checkpoint"})
    width_mult: List[str] = field(  # noqa: UP006
        default_factory=lambda: ["2/3"],
        metadata={"help": "kept fraction(s) of heads and feed-forward neurons"},
    )
    distill_loss: str = field(
        default="sigmoid",
        metadata={"help": "of the logits: per label or softmax", "choices": ["sigmoid", "softmax"]},
    )
    gold_weight: float = field(
        default=0.0, metadata={"help": "share of the gold labels in the loss, 0 to 1"}
    )


def parse_args(argv=None):
    """All arguments in one namespace; width_mult as a list of Fractions."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = trainer.PdArgumentParser(
        (TrainingArguments, DataArguments, ModelArguments),
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    known = {f.name for f in fields(trainer.TrainingArguments)}
    given = {arg[2:].split("=")[0] for arg in argv if arg.startswith("--")}
    if idle := sorted((given & known) - SUPPORTED):
        raise UserError(f"--{idle[0]} has no effect on pruning; leave it out")
    try:
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        raise UserError(str(error)) from error
    args = SimpleNamespace(**{k: v for part in parsed for k, v in vars(part).items()})
    args.device = args.device.lower()
    check_args(args)
    if sum(arg.split("=")[0] == "--width_mult" for arg in argv) > 1:
        raise UserError("--width_mult twice; give all widths after one")
    args.width_mult = list(dict.fromkeys(map(parse_width, args.width_mult)))
    return args


def check_args(args):
    minima = {
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
        **dict.fromkeys(("logging_steps", "save_steps"), 1),
        **dict.fromkeys(("seed", "learning_rate", "weight_decay", "max_grad_norm"), 0),
        **dict.fromkeys(("warmup_steps", "warmup_ratio", "gold_weight"), 0),
    }
    for name, minimum in minima.items():
        if not minimum <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name)} is not a number of at least {minimum}")
    if not 0 < args.num_train_epochs < float("inf") and args.max_steps <= 0:
        raise UserError(f"--num_train_epochs {args.num_train_epochs} is not a number above 0")
    if args.gold_weight > 1:
        raise UserError(f"--gold_weight {args.gold_weight} is not between 0 and 1")
    if args.dataset_dir is None:
        raise UserError("--dataset_dir is needed: the folder of train.txt, dev.txt and label.txt")


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


def check_targets(args):
    """The folders of all widths can be written, and none is the teacher's. Raises UserError."""
    for width in args.width_mult:
        target = Path(args.output_dir) / str(float(width))
        if target.resolve() == Path(args.params_dir).resolve():
            raise UserError(f"--output_dir: {target} is the checkpoint itself; give another folder")
        if (target / utils.CONFIG_FILE).exists():
            logger.warning("%s holds a model; the new one will replace it", target)
        with utils.atomic_folder(target):
            pass  # nothing changes, but an error shows now and not after the first evaluation


def read_data(args, info):
    """(train, dev), each (token ids, label ids)."""
    data = Path(args.dataset_dir)
    utils.check_labels(data, None, info.labels)
    tokenizer, sets = utils.load_tokenizer(args.params_dir), []
    for name in ("train.txt", "dev.txt"):
        texts, label_ids = utils.read_examples(data / name, info.labels)
        encoded, cut = utils.encode(texts, tokenizer, args.max_seq_length)
        utils.warn_truncated(cut, len(texts), args.max_seq_length)
        sets.append((encoded, label_ids))
    return sets


def main(argv=None):
    args = parse_args(argv)
    try:
        from prune_trainer import Pruner
    except ImportError as error:
        if "paddleslim" not in str(error):
            raise
        raise UserError("Cannot import paddleslim, please install paddleslim==2.6.0") from error
    set_device(args.device)
    if dist.get_world_size() > 1:
        dist.init_parallel_env()
        if dist.get_rank():
            logger.setLevel("WARNING")  # every rank would say the same
    teacher, info = load_checkpoint(args.params_dir)
    utils.check_length(args.max_seq_length, info.max_position)
    if "width_mult" in utils.read_json(Path(args.params_dir) / utils.CONFIG_FILE):
        raise UserError(f"{args.params_dir}: pruned already; give the checkpoint of full width")
    check_widths(args.width_mult, teacher.config.num_attention_heads)
    if args.max_seq_length < info.max_seq_length:
        lengths = args.max_seq_length, info.max_seq_length
        logger.warning("--max_seq_length %d, but the checkpoint was trained with %d", *lengths)
    if info.thresholds is not None:
        logger.warning("The thresholds were tuned for the teacher; tune the students' anew")
    train_set, dev_set = read_data(args, info)
    if dist.get_rank() == 0:
        check_targets(args)
    paddle.seed(args.seed)
    logger.info("Pruning starts.")
    pruner = Pruner(args, teacher, info.labels, train_set, dev_set)
    for width in args.width_mult:
        pruner.prune(width)


if __name__ == "__main__":
    utils.cli(main)
