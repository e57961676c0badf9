"""Augment a training set: substitute, insert, delete or swap words, or a mix of these.

    python aug.py --train_path ../data/train.txt --aug_path ../data/aug.txt --aug_strategy mix

The word lists of PaddleNLP's dataaug come from --dict_dir or, without it, from PaddleNLP's own
cache, into which they are downloaded once. `--aug_type mlm` asks a masked language model instead of
a dictionary; `--mlm_model` may be a local folder.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import itertools
import random
import sys
from pathlib import Path

import numpy as np
from paddle.utils.download import get_path_from_url
from paddlenlp import dataaug
from paddlenlp.utils.env import DATA_HOME
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402
from export_model import set_device  # noqa: E402
from utils import UserError, at_least, logger  # noqa: E402

STRATEGIES = ("substitute", "insert", "delete", "swap")
SOURCE = "bring it from {} or make it with word_lists.py"
TRIES = 5  # draws for each new text before giving up


def add_augmentation_flags(parser):
    """The flags that aug.py and sparse.py share."""
    add = parser.add_argument_group("augmentation").add_argument
    add("--aug_percent", type=at_least(0.0), default=0.1, help="share of the words to change")
    add("--dict_dir", help="folder with dataaug's word lists; None: PaddleNLP's cache")


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--train_path", default="../data/train.txt", help="training set to augment")
    add("--aug_path", default="../data/aug.txt", help="the augmented texts with their labels")
    add("--label_file", help="label names; None: label.txt beside the training set")
    add_augmentation_flags(parser)
    add = parser.add_argument_group("strategy").add_argument
    strategies = ["mix", *STRATEGIES]
    add("--aug_strategy", choices=strategies, default="substitute", help="what to do with words")
    types = "where new words come from"
    add("--aug_type", choices=["synonym", "homonym", "mlm"], default="synonym", help=types)
    add("--mlm_model", default="ernie-1.0-large-zh-cw", help="a local model folder or a name")
    add("--create_n", type=at_least(1), default=2, help="new texts per text")
    add("--seed", type=at_least(0), default=3, help="seed of all randomness")
    add("--device", type=str.lower, default="gpu", help="of mlm: cpu, gpu, gpu:0, xpu or npu")
    return parser.parse_args(argv)


def find_file(name, md5, url, dict_dir):
    """Path of a word list: in dict_dir if given, else in PaddleNLP's cache, else downloaded there.

    A file in dict_dir may be the user's own. Raises UserError if it can't be had.
    """
    if dict_dir:
        path = Path(dict_dir) / name
        if not path.is_file():
            raise UserError(f"--dict_dir {dict_dir}: no {name}; {SOURCE.format(url)}")
        return path
    cached = sorted(Path(DATA_HOME).glob(f"*/{name}"))  # dataaug has a folder for each class
    if cached:
        return cached[0]
    folder = Path(DATA_HOME) / "dataaug"
    logger.info("Downloading %s to %s", url, folder)
    try:
        return Path(get_path_from_url(url, str(folder), md5))
    except Exception as error:  # requests' errors, RuntimeError after all retries
        raise UserError(
            f"{name} cannot be downloaded ({type(error).__name__}): {SOURCE.format(url)}, and give "
            "its folder as --dict_dir"
        ) from error


def find_mlm(name):
    """Checks a local folder of a masked language model; a name is left to PaddleNLP's download."""
    if not Path(name).is_dir():
        return name
    weights = utils.load_weights(Path(name) / utils.WEIGHTS_FILE)  # refuses a pickle with code
    if not any(key.startswith("cls.") for key in weights):
        raise UserError(f"--mlm_model {name}: it has no head for masked words (cls.*)")
    return str(Path(name).resolve())


def check_dictionary(path):
    """Raises UserError if the file is not {word: [at least one word]}."""
    for word, others in utils.read_json(path).items():
        if not (isinstance(others, list) and others and all(isinstance(o, str) for o in others)):
            raise UserError(f"{path}: '{word}' has no list of words; mend or remove it")


def make_augmenter(strategy, aug_percent, dict_dir=None, aug_type="synonym", mlm_model=None):
    """A dataaug object: augmenter.augment(text) returns [[new text]], or [[]] if it finds none.

    strategy: one of STRATEGIES; aug_type and mlm_model matter to substitute and insert only.
    Raises UserError for a word list or a model that can't be had.
    """
    loaded = []

    class Augmenter(getattr(dataaug, f"Word{strategy.capitalize()}")):
        def _load_file(self, mode):
            path = find_file(*self._DATA[mode], dict_dir)
            loaded.append(path)
            if mode.startswith("word_"):
                check_dictionary(path)
            return str(path)

    arguments = {"create_n": 1, "aug_percent": aug_percent}
    if strategy in ("substitute", "insert"):
        arguments["aug_type"] = aug_type
        if aug_type == "mlm":
            arguments["model_name"] = find_mlm(mlm_model)
    try:
        augmenter = Augmenter(**arguments)
    except UserError:
        raise
    except Exception as error:  # a broken word list or model raises almost anything
        where = f"--mlm_model {mlm_model}" if "model_name" in arguments else loaded[-1]
        raise UserError(f"{where}: cannot be loaded ({type(error).__name__}: {error})") from error
    augmenter.aug_percent = aug_percent  # WordSwap takes no notice of its argument
    augmenter.stop_words = frozenset(augmenter.stop_words)  # every word is looked up in it
    augmenter.max_length = None
    if "model_name" in arguments:
        augmenter.mlm_model.eval()
        positions = augmenter.mlm_model.config["max_position_embeddings"]
        augmenter.max_length = positions - 2  # [CLS] and [SEP]
    return augmenter


def new_texts(text, augmenters, create_n, seen):
    """Up to create_n augmented texts that are not in the set `seen`; they are added to it.

    augmenters: an iterator over dataaug objects; each draw takes the next one.
    """
    found = []
    for augmenter in itertools.islice(augmenters, TRIES * create_n):
        if augmenter.max_length and len(text) > augmenter.max_length:
            continue  # a token has at least one character
        for new in augmenter.augment(text)[0]:
            new = new.strip()
            # A masked language model may answer with pieces of words or the unknown token.
            odd = any(sign in new and sign not in text for sign in ("##", "[", "\t", "\n"))
            if new and new not in seen and not odd:
                seen.add(new)
                found.append(new)
        if len(found) == create_n:
            break
    return found


def main(argv=None):
    args = parse_args(argv)
    train_path = Path(args.train_path)
    label_file = Path(args.label_file or train_path.with_name("label.txt"))
    labels = utils.read_labels(label_file)
    texts, label_ids = utils.read_examples(train_path, labels)
    utils.check_outputs([args.aug_path], [train_path, label_file])
    random.seed(args.seed)
    np.random.seed(args.seed)
    strategies = STRATEGIES if args.aug_strategy == "mix" else (args.aug_strategy,)
    if args.aug_type == "mlm" and {"substitute", "insert"} & set(strategies):
        set_device(args.device)
    own = (args.aug_percent, args.dict_dir, args.aug_type, args.mlm_model)
    augmenters = itertools.cycle([make_augmenter(strategy, *own) for strategy in strategies])
    seen, rows = set(texts), []
    fewer = 0
    for text, ids in zip(tqdm(texts, leave=False, disable=None), label_ids):
        found = new_texts(text, augmenters, args.create_n, seen)
        rows += [(new, [labels[i] for i in ids]) for new in found]
        fewer += len(found) < args.create_n
    if not rows:
        raise UserError(f"{train_path}: no text could be augmented; nothing was written")
    with utils.atomic_file(args.aug_path) as file:
        utils.write_rows(file, *zip(*rows), labels, jsonl=False)
    if fewer:
        logger.warning(
            "%d of %d texts gave fewer than %d new ones: too short, or no other text was found",
            *(fewer, len(texts), args.create_n),
        )
    logger.info("%d augmented texts of %d saved in %s", len(rows), len(texts), args.aug_path)


if __name__ == "__main__":
    utils.cli(main)
