"""Read, encode, batch, run batches, save: the pipeline that every script shares.

    text - read_* -> examples - encode -> token ids - batches -> forward -> logits
    logits - metric.decode -> labels

`forward` is any callable from a padded NumPy batch (`input_ids`, `token_type_ids`, int64
[batch, length]) to NumPy logits (float32 [batch, classes]); every back end supplies its own. This
file imports no deep-learning framework, so that a deployment can use it without one.
"""

import argparse
import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tqdm import tqdm

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model_state.pdparams"
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
MAX_REPORTED = 10  # offending lines listed in one error message


class UserError(Exception):
    """Something the user can mend; `cli` prints it without a traceback and exits with status 2."""


class _StderrHandler(logging.StreamHandler):
    """Looks sys.stderr up at every record, so that redirection after the import works."""

    stream = property(lambda self: sys.stderr, lambda self, value: None)


logger = logging.getLogger("multi_label")
if not logger.handlers:
    _handler = _StderrHandler()
    _handler.setFormatter(logging.Formatter("[%(asctime)-15s] [%(levelname)8s] - %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def cli(main):
    """Runs a script's `main()`; errors of the user become one message and exit status 2."""
    # A shell that starts a job in the background makes it ignore Ctrl-C; a script should not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; no file was left half-written"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    else:
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def at_least(minimum):
    """An argparse type: a number of the same kind as `minimum` and not below it."""

    def parse(value):
        number = type(minimum)(value)
        if not number >= minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return number

    parse.__name__ = type(minimum).__name__  # argparse names it in "invalid int value"
    return parse


# ---------------------------------------------------------------------------------------- read
def _decoded_lines(path, problems):
    """Yields (line number, text) of a UTF-8 file, BOM, LF or CRLF; bad lines go to `problems`."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path and the file name") from error
    with file:
        for number, raw in enumerate(file, 1):
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                problems.append(f"{path}:{number}: not valid UTF-8 ({bad}); save the file as UTF-8")


def _raise_problems(problems):
    if problems:
        shown = problems[:MAX_REPORTED]
        if len(problems) > MAX_REPORTED:
            shown.append(f"... and {len(problems) - MAX_REPORTED} more such lines")
        raise UserError("\n".join(shown))


def read_labels(path):
    """Label names of `label.txt`; the 0-based line number is the class id.

    Raises UserError for blank lines, duplicates, names with a comma or a tab, and an empty file.
    """
    problems, first_line = [], {}
    for number, line in _decoded_lines(path, problems):
        name = line.strip()
        if not name:
            problems.append(f"{path}:{number}: blank label name; remove the line")
        elif name in first_line:
            problems.append(
                f"{path}:{number}: label '{name}' stands already in line {first_line[name]}"
            )
        elif "," in name or "\t" in name:
            problems.append(f"{path}:{number}: label '{name}' has a comma or tab; rename it")
        else:
            first_line[name] = number
    _raise_problems(problems)
    if not first_line:
        raise UserError(f"{path}: no labels; write one label name per line")
    return list(first_line)


def read_examples(path, labels):
    """Reads `text<TAB>label,label` lines of a train, dev or test file.

    Returns (texts, label_ids): a list of str and a list of int lists, in the order of the line.
    `text<TAB>` is a sample without labels; blank lines are skipped with one warning; the header
    line that predict.py writes is skipped too, so that its output can be read back.
    Raises UserError that lists up to 10 offending lines.
    """
    ids = {name: i for i, name in enumerate(labels)}
    texts, label_ids, problems, blank = [], [], [], 0
    for number, line in _decoded_lines(path, problems):
        fields = line.split("\t")
        if len(fields) == 1:
            if line.strip():
                problems.append(
                    f"{path}:{number}: no tab between text and labels "
                    "(a text without labels ends in a tab)"
                )
            else:
                blank += 1
        elif len(fields) > 2:
            problems.append(
                f"{path}:{number}: {len(fields) - 1} tabs; write text<TAB>label,label "
                "and no tab inside the text"
            )
        elif number == 1 and fields == ["text", "label"] and "label" not in ids:
            continue
        else:
            names = [name.strip() for name in fields[1].split(",")] if fields[1].strip() else []
            unknown = [name for name in names if name not in ids]
            if unknown:
                problems.append(
                    f"{path}:{number}: unknown label '{unknown[0]}'; "
                    f"it is not among the {len(labels)} label names"
                )
            texts.append(fields[0].strip())
            label_ids.append(list(dict.fromkeys(ids[name] for name in names if name in ids)))
    _raise_problems(problems)
    if not texts:
        raise UserError(f"{path}: no samples; write one text<TAB>label,label per line")
    if blank:
        logger.warning("%s: skipped %d blank line(s)", path, blank)
    return texts, label_ids


def read_texts(path):
    """Yields the texts of a data file, one per line, empty ones included (line n answers line n).

    Raises UserError for a missing or empty file and at the first line that is not UTF-8.
    """
    problems, empty = [], True
    for _, line in _decoded_lines(path, problems):
        _raise_problems(problems)
        empty = False
        yield line
    _raise_problems(problems)
    if empty:
        raise UserError(f"{path}: empty file; write one text per line")


def chunks(items, size):
    """Lists of up to `size` consecutive items of an iterable."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def multi_hot(label_ids, num_labels):
    """0/1 float32 targets [len(label_ids), num_labels]."""
    targets = np.zeros((len(label_ids), num_labels), dtype=np.float32)
    for row, ids in zip(targets, label_ids):
        row[ids] = 1.0
    return targets


# -------------------------------------------------------------------------------------- encode
# PaddleNLP's BERT-style tokenizers make every symbol a token of its own, BERT's do not.
_SYMBOLS = Regex(r"[\p{S}\u00B2\u00B5\u00BA\u00D8\u014B\u01B1\u3007]")


def load_tokenizer(folder):
    """The tokenizer of a model folder; gives the same token ids as PaddleNLP's, faster.

    Raises UserError if vocab.txt is missing or lacks a special token.
    """
    folder, problems = Path(folder), []
    path = folder / "vocab.txt"
    vocab = {line.rstrip("\n"): number - 1 for number, line in _decoded_lines(path, problems)}
    _raise_problems(problems)
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; not a BERT-style vocabulary")
    config = folder / "tokenizer_config.json"
    lower = read_json(config).get("do_lower_case", True) if config.exists() else True
    model = WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_SYMBOLS, "isolated"), pre_tokenizers.BertPreTokenizer()]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def encode(texts, tokenizer, max_seq_length):
    """[CLS] text [SEP] as int32 arrays of at most `max_seq_length` ids; the tail of a text is cut.

    Returns (list of arrays, number of texts that were cut).
    """
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    encoded, cut = [], 0
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids = encoding.ids
        cut += len(ids) > max_seq_length - 2
        encoded.append(np.array([cls_id, *ids[: max_seq_length - 2], sep_id], dtype=np.int32))
    return encoded, cut


def warn_truncated(cut, total, max_seq_length):
    if cut:
        logger.warning(
            "%d of %d texts (%.1f%%) are longer than max_seq_length %d; their tails are cut",
            *(cut, total, 100 * cut / total, max_seq_length),
        )


# --------------------------------------------------------------------------------------- batch
def batches(lengths, batch_size, rng=None, batching="sorted", group=1, window=50):
    """Index arrays of one pass over the data.

    Without `rng` (evaluation) the longest texts come first. With `rng` (training) the order is
    shuffled; `batching="sorted"` then sorts by length inside windows of `window` batches, so that
    little is padded, and shuffles the batches. `group` batches of like length stay side by side for
    the ranks of one training step; the last group is filled up with the first batches.
    """
    lengths = np.asarray(lengths)
    if rng is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    order = rng.permutation(len(lengths))
    if batching == "sorted":
        # Windows of equal size: a small last one would hold texts of all lengths.
        num_windows = -(-len(order) // (window * batch_size * group))
        parts = np.array_split(order, num_windows)
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in parts])
    result = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    result += (result * group)[: -len(result) % group]
    groups = [result[i : i + group] for i in range(0, len(result), group)]
    return [batch for i in rng.permutation(len(groups)) for batch in groups[i]]


def pad(sequences, pad_id=0):
    """Padded batch: `input_ids` and `token_type_ids` (all 0), int64 [batch, longest]."""
    input_ids = np.full((len(sequences), max(map(len, sequences))), pad_id, dtype=np.int64)
    for row, ids in zip(input_ids, sequences):
        row[: len(ids)] = ids
    return {"input_ids": input_ids, "token_type_ids": np.zeros_like(input_ids)}


def run_batches(forward, encoded, batch_size, rank=0, world_size=1, desc=None):
    """Yields (batch number, example indices, logits); of several ranks each runs its own batches.

    With `desc` a progress bar of that name is shown, on a terminal only.
    """
    plan = batches([len(ids) for ids in encoded], batch_size)
    for number, index in enumerate(tqdm(plan, desc, leave=False, disable=None if desc else True)):
        if number % world_size == rank:
            yield number, index, forward(**pad([encoded[i] for i in index]))


def logits_of(forward, encoded, batch_size, num_labels, desc=None):
    """Logits of all examples in their own order, float32 [examples, classes]."""
    logits = np.empty((len(encoded), num_labels), dtype=np.float32)
    for _, index, batch_logits in run_batches(forward, encoded, batch_size, desc=desc):
        logits[index] = batch_logits
    return logits


# ---------------------------------------------------------------------------------- model folders
@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint or bundle says about itself in config.json."""

    labels: list  # label names in the order of the logits
    max_seq_length: int  # [CLS] and [SEP] included
    max_position: int  # the longest sequence that the model can take
    thresholds: list | None  # one per label; None: metric.DEFAULT_THRESHOLD


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_model_info(folder):
    """ModelInfo of a checkpoint or bundle; raises UserError if it is none or is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that train.py wrote")
    config = read_json(folder / CONFIG_FILE)
    where = folder / CONFIG_FILE
    try:
        names = config["id2label"]
        labels = [names[str(i)] for i in range(len(names))]
        max_seq_length = int(config["max_seq_length"])
        max_position = int(config["max_position_embeddings"])
        thresholds = config.get("thresholds")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {error!r} missing or malformed; was the model made by train.py?"
        ) from error
    if thresholds is not None and len(thresholds) != len(labels):
        raise UserError(f"{where}: {len(thresholds)} thresholds for {len(labels)} labels")
    return ModelInfo(labels, max_seq_length, max_position, thresholds)


def check_labels(label_file, labels):
    """`label.txt`, where there is one, must name the model's labels in the model's order."""
    if Path(label_file).exists():
        listed = read_labels(label_file)
        for number, (listed_name, name) in enumerate(zip(listed, labels), 1):
            if listed_name != name:
                raise UserError(
                    f"{label_file}:{number}: '{listed_name}' where the model has '{name}'; "
                    "give the label file that it was trained with"
                )
        if len(listed) != len(labels):
            raise UserError(
                f"{label_file}: {len(listed)} labels where the model has {len(labels)}; "
                "give the label file that it was trained with"
            )


def check_length(max_seq_length, max_position):
    if not 3 <= max_seq_length <= max_position:
        raise UserError(
            f"--max_seq_length {max_seq_length}: this model takes 3 to {max_position} tokens"
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and containers only; a pickle that names anything else is refused."""

    allowed = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict"),
        ("builtins", "tuple"),
        ("_codecs", "encode"),
    }

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no weights file needs")
        return super().find_class(module, name)


def load_weights(path):
    """{parameter name: array} of a `.pdparams` file, read without running code that it may carry.

    Raises UserError if the file is missing, truncated, or holds anything but arrays.
    """
    try:
        with open(path, "rb") as file:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
        # paddle.save stores a tensor as (name, array), and a table of names beside them.
        weights = {k: v[1] if isinstance(v, tuple) else v for k, v in loaded.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a broken pickle raises almost anything
        raise UserError(f"{path}: broken weights file ({error})") from error
    return {k: v for k, v in weights.items() if isinstance(v, np.ndarray)}


def save_weights(file, weights):
    """Writes {parameter name: array} in the format of paddle.save to an open binary file."""
    pickle.dump(dict(weights), file, protocol=4)


def copy_tokenizer(source, target):
    """Copies the tokenizer files of a model folder; writes the configuration if there is none."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    config = Path(target) / "tokenizer_config.json"
    if not config.exists():  # PaddleNLP cannot load the folder without
        config.write_text('{"tokenizer_class": "ErnieTokenizer", "do_lower_case": true}\n')


# ------------------------------------------------------------------------------------------ save
def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """`with atomic_file(path) as file`: the file appears whole when the block ends, or not at all.

    Raises UserError if it can't be written (disk full, no such folder); the old file then stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; nothing was replaced") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path, last=WEIGHTS_FILE):
    """`with atomic_folder(path) as temporary`: what the block puts there appears as a whole.

    A new folder is renamed into place. In an old one the files are replaced one by one; `last`,
    without which no reader accepts the folder, is taken away first and put back last, unless it is
    all that changed.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _fsync(file)
        if not path.exists():
            os.rename(temporary, path)
        else:
            names = [file.name for file in temporary.iterdir() if file.name != last]
            changed = [name for name in names if not _same_content(temporary / name, path / name)]
            if changed:
                (path / last).unlink(missing_ok=True)
            for name in [*changed, last]:
                os.replace(temporary / name, path / name)
            _fsync(path)
        _fsync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; nothing was replaced") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _same_content(a, b):
    return b.exists() and a.read_bytes() == b.read_bytes()
