"""Augment a training set: substitute, insert, delete or swap words, or a mix of these.

    python aug.py --train_path ../data/train.txt --aug_path ../data/aug.txt --aug_strategy mix

The word lists of PaddleNLP's dataaug come from --dict_dir or, without it, from PaddleNLP's own
cache, into which they are downloaded once. `--aug_type mlm` asks a masked language model instead of
a dictionary; `--mlm_model` may be a local folder.
"""

import itertools
import random
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augmentation import STRATEGIES, add_augmentation_flags, make_augmenter, new_texts

import utils
from utils import UserError, at_least, logger

model = utils.LazyModule("model")


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--train_path", default="../data/train.txt", help="training set to augment")
    add("--aug_path", default="../data/aug.txt", help="the augmented texts with their labels")
    add("--label_file", help="label names; None: label.txt beside the training set")
    add_augmentation_flags(parser)
    add = parser.add_argument_group("strategy").add_argument
    strategies, types = ["mix", *STRATEGIES], ["synonym", "homonym", "mlm"]
    add("--aug_strategy", choices=strategies, default="substitute", help="what to do with words")
    add("--aug_type", choices=types, default="synonym", help="where new words come from")
    add("--mlm_model", default="ernie-1.0-large-zh-cw", help="a local model folder or a name")
    add("--create_n", type=at_least(1), default=2, help="new texts per text")
    add("--seed", type=at_least(0), default=3, help="seed of all randomness")
    add("--device", type=str.lower, default="gpu", help="of mlm: cpu, gpu, gpu:0, xpu or npu")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    train_path = Path(args.train_path)
    label_file = args.label_file or train_path.with_name("label.txt")
    utils.check_outputs([args.aug_path], [train_path, label_file])
    labels = utils.read_labels(label_file)
    texts, label_ids = utils.read_examples(train_path, labels)
    strategies = STRATEGIES if args.aug_strategy == "mix" else (args.aug_strategy,)
    if args.aug_type == "mlm" and {"substitute", "insert"} & set(strategies):
        model.set_device(args.device)
    augmenters = [
        make_augmenter(name, args.aug_percent, args.dict_dir, args.aug_type, args.mlm_model)
        for name in strategies
    ]
    utils.check_outputs([args.aug_path], [file for a in augmenters for file in a.files])
    random.seed(args.seed)  # now: importing Paddle draws random numbers, too
    np.random.seed(args.seed)
    rows, fewer, seen, draws = [], 0, set(texts), itertools.cycle(augmenters)
    for text, ids in zip(tqdm(texts, leave=False, disable=None), label_ids):
        found = new_texts(text, draws, args.create_n, seen)
        rows += [(new, [labels[i] for i in ids]) for new in found]
        fewer += len(found) < args.create_n
    if not rows:
        raise UserError(f"{train_path}: no text could be augmented; nothing was written")
    with utils.atomic_file(args.aug_path) as file:
        utils.write_rows(file, *zip(*rows), labels, jsonl=False)
    if fewer:
        message = "%d of %d texts gave fewer than %d new ones: too short, or no other was found"
        logger.warning(message, fewer, len(texts), args.create_n)
    logger.info("%d augmented texts of %d saved in %s", len(rows), len(texts), args.aug_path)


if __name__ == "__main__":
    utils.cli(main)
