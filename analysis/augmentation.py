"""PaddleNLP's dataaug with checked word lists, offline and without repetitions.

Shared by aug.py and sparse.py.
"""

import importlib
import itertools
import sys
import types
from pathlib import Path

import utils
from utils import UserError, at_least, logger

model = utils.LazyModule("model")

STRATEGIES = ("substitute", "insert", "delete", "swap")
SOURCE = "bring it from {} or make it with word_lists.py"
TRIES = 5  # draws for each new text before giving up


def add_augmentation_flags(parser):
    """The flags that aug.py and sparse.py share."""
    add = parser.add_argument_group("augmentation").add_argument
    add("--aug_percent", type=at_least(0.0), default=0.1, help="share of the words to change")
    add("--dict_dir", help="folder with dataaug's word lists; None: PaddleNLP's cache")


def find_file(name, md5, url, dict_dir):
    """Path of a word list: in dict_dir if given, else in PaddleNLP's cache, else downloaded there.

    A file in dict_dir may be the user's own. Raises UserError if there is none.
    """
    from paddle.utils.download import get_path_from_url
    from paddlenlp.utils.env import DATA_HOME

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


def check_dictionary(path):
    """Raises UserError if the file is not {word: [at least one word]}."""
    for word, others in utils.read_json(path).items():
        if not (isinstance(others, list) and others and all(isinstance(o, str) for o in others)):
            raise UserError(f"{path}: '{word}' has no list of words; correct or remove it")


def import_dataaug():
    """paddlenlp.dataaug. Its sentence-level methods, which are not used here, want task flows and
    with these pandas, pyarrow and data sets; an empty module of that name satisfies them."""
    model.transformers.__name__  # imported first, it keeps the rest of PaddleNLP out
    stub = types.ModuleType("paddlenlp.taskflow")
    stub.Taskflow = None
    added = sys.modules.setdefault(stub.__name__, stub) is stub
    try:
        return importlib.import_module("paddlenlp.dataaug")
    finally:
        if added:
            del sys.modules[stub.__name__]


def make_augmenter(strategy, aug_percent, dict_dir=None, aug_type="synonym", mlm_model=None):
    """A dataaug object: augmenter.augment(text) returns [[new text]], or [[]] if it finds none.

    strategy: one of STRATEGIES; aug_type and mlm_model matter to substitute and insert only. The
    files that it reads are augmenter.files. Raises UserError for broken or missing ones.
    """
    dataaug, files = import_dataaug(), []

    class Augmenter(getattr(dataaug, f"Word{strategy.capitalize()}")):
        def _load_file(self, mode):
            files.append(find_file(*self._DATA[mode], dict_dir))
            if mode.startswith("word_"):
                check_dictionary(files[-1])
            return str(files[-1])

    uses_type = strategy in ("substitute", "insert")
    uses_mlm = uses_type and aug_type == "mlm"
    arguments = {"aug_type": aug_type} if uses_type else {}
    if uses_mlm:
        arguments["model_name"] = mlm_model  # a name is left to PaddleNLP's download
        if Path(mlm_model).is_dir():
            arguments["model_name"] = str(Path(mlm_model).resolve())
            weights = model.load_weights(Path(mlm_model) / utils.WEIGHTS_FILE)  # runs no code in it
            if not any(key.startswith("cls.") for key in weights):
                raise UserError(f"--mlm_model {mlm_model}: it has no head for masked words (cls.*)")
    try:
        augmenter = Augmenter(create_n=1, aug_percent=aug_percent, **arguments)
    except UserError:
        raise
    except Exception as error:  # a broken word list or model raises almost anything
        where = f"--mlm_model {mlm_model}" if uses_mlm else files[-1]
        raise UserError(f"{where}: cannot be loaded ({type(error).__name__}: {error})") from error
    augmenter.aug_percent = aug_percent  # WordSwap takes no notice of its argument
    augmenter.stop_words = frozenset(augmenter.stop_words)  # every word is looked up in it
    augmenter.files, augmenter.max_length = files, None
    if uses_mlm:
        files += Path(mlm_model).glob("*")
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
