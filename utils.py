"""Read, encode, batch, run, decide, save: the pipeline that every script shares.

    text - read_* -> examples - encode -> token ids - batches -> forward -> logits -> labels

`forward` is any callable from a padded NumPy batch (`input_ids`, `token_type_ids`, int64
[batch, length]) to NumPy logits (float32 [batch, classes]); every back end supplies its own, and
`Labeller` does the rest. This file imports no deep-learning framework, so that a deployment can use
it without one.
"""

import _thread
import argparse
import contextlib
import difflib
import filecmp
import hashlib
import importlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import unicodedata
import warnings
import zlib  # noqa: F401  see below
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tqdm import tqdm

import metric

# zlib: libpaddle 2.6 exports zlib symbols of its own, and zlib crashes if it is loaded after it.
# Every script imports this file before Paddle, so this is the one place that has to care.

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model_state.pdparams"
TOKENIZER_FILES = ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
ONNX_FILES = {"fp32": "model.onnx", "fp16": "fp16_model.onnx", "int8": "int8_model.onnx"}
GRAPH_SUFFIXES = ".pdmodel", ".json"  # of a static graph of Paddle 2 and of Paddle 3
LOCK_FILE = ".multi_label.lock"
RUN_FILE = ".multi_label_run"  # .lock and .json: see run_lock
CACHE_FOLDER = "training_cache"  # of the encoded sets of a run, in the folder that it writes to
SET_FILE = "set.json"  # of an encoded set; written last
SET_FORMAT = 1  # of an encoded set; sets of other formats are not read
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
BOM = "\ufeff".encode()  # byte order mark
MAX_REPORTED = 10  # offending lines listed in one error message
MAX_LINE = 500_000  # bytes; longer than any document, so the file has lost its line ends
CHUNK = 8192  # texts that are read, encoded and sorted by length at a time
SET_CHUNK = 1024  # texts of a data file that are encoded and appended to a set at a time
CHUNK_CELLS = 1 << 22  # fewer with many labels: texts x labels of a chunk (float32: 16 MiB)
MAX_WORD = 100  # characters; a longer word is [UNK]
ENCODE_CHARACTERS = 1 << 18  # tokenised at a time: an encoding holds much more than the ids
# Share of a window that the next one repeats. A clause that is cut at a seam is whole in one of the
# two: a quarter of 126 tokens is longer than nine of ten clauses of the real set.
OVERLAP = 0.25


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


class LazyModule:
    """The module of this name, imported when an attribute of it is used for the first time.

    Paddle takes seconds to import, and `--help` or a mistyped flag should not have to wait for it.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        global _pending
        outermost = self._name not in sys.modules and _pending is None
        if outermost:
            _pending = []
        try:
            return getattr(importlib.import_module(self._name), attribute)
        except ModuleNotFoundError as error:
            raise UserError(f"{error}; install what requirements.txt lists") from error
        finally:
            if outermost:
                stops, _pending = _pending, None
                if stops:
                    raise stops[0]


# ----------------------------------------------------------------------------- command line
_interrupted = False  # by Ctrl-C
# Signals that arrive during an import of LazyModule, as exceptions, else None. They wait for its
# end: PaddleNLP swallows every exception around some imports, and Paddle 3 aborts the process.
_pending = None


def cli(main):
    """Runs a script's `main()`. Its exit status is 2 after an error of the user, which becomes one
    message, and as in a shell 130 after Ctrl-C, 143 after SIGTERM, 141 if nobody reads stdout."""
    global _interrupted
    status = 2
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which a background job inherits
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _unraisable
    _silence_libraries()
    if sys.stdout:  # closed from the start in `script >&-`
        sys.stdout.reconfigure(errors="backslashreplace")  # not every locale knows every character
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
        return
    except (Exception, KeyboardInterrupt) as error:
        if _interrupted or isinstance(error, KeyboardInterrupt):  # libraries wrap it now and then
            message, status = "interrupted; no file was left half-written", 130
        elif isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout when it exits
            sys.exit(141)
        elif isinstance(error, UserError):
            message = str(error)
        elif isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            message = f"{where}{error.strerror or error}"
        else:
            raise
    finally:
        _interrupted = False
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _silence_libraries():
    """What Paddle and its packages say to their developers whenever they are imported."""
    os.environ.setdefault("GLOG_minloglevel", "2")  # errors only; of Paddle's C++ code
    for note in ("Setuptools is replacing", "No ccache found", "pkg_resources is deprecated"):
        warnings.filterwarnings("ignore", message=note)


def _interrupt(*_):
    global _interrupted
    _interrupted = True
    _stop(KeyboardInterrupt())


def _terminate(*_):
    _stop(SystemExit(143))  # so that temporary files are removed


def _stop(error):
    if _pending is None:
        raise error
    _pending.append(error)


def _unraisable(event):
    """Python prints a Ctrl-C that hits a destructor (a progress bar's) and goes on; here it is
    sent again, to the code that runs a moment later."""
    if isinstance(event.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(event)


def at_least(minimum):
    """An argparse type: a finite number of the same kind as `minimum` and not below it."""

    def parse(value):
        number = type(minimum)(value)
        if not minimum <= number < float("inf"):
            raise argparse.ArgumentTypeError(f"{value} is not a number of at least {minimum}")
        return number

    parse.__name__ = type(minimum).__name__  # argparse names it in "invalid int value"
    return parse


def new_parser(doc, **settings):
    """An ArgumentParser with the first line of a script's docstring; help texts show defaults."""
    style = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=style, **settings
    )


def add_inference_flags(parser, params_path):
    """The flags of the scripts that run a checkpoint."""
    add = parser.add_argument_group("model").add_argument
    add("--params_path", default=params_path, help="checkpoint folder")
    add("--max_seq_length", type=at_least(3), help="longest sequence; None: the checkpoint's")
    add("--batch_size", type=at_least(1), default=32, help="texts per forward pass")
    add("--device", type=str.lower, default="gpu", help="cpu, gpu, gpu:0, xpu or npu")


def add_limit_flags(add, source):
    """The flags that bound the number of labels of a text; None takes the limit of `source`."""
    least = f"a text with fewer labels gets those nearest to their thresholds; None: {source}"
    most = f"a text with more labels keeps the best; None: {source}"
    add("--min_labels", type=at_least(0), help=least)
    add("--max_labels", type=at_least(0), help=most)


def add_decision_flags(parser, source):
    """The flags of whoever labels texts; `source` names the model folder."""
    add = parser.add_argument_group("decision").add_argument
    longer = "longer texts: cut the tail, or label all of it in overlapping windows"
    add("--long_text", choices=["truncate", "window"], default="truncate", help=longer)
    add_limit_flags(add, source)


def num_cores():
    """Physical cores that this process may use; two threads of one core share its arithmetic.

    CPU affinity and a container's quota count.
    """
    import joblib  # takes a moment

    cores = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else []:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    if cores:
        return min(len(cores), joblib.cpu_count())
    return joblib.cpu_count(only_physical_cores=True)  # of Windows and macOS


def processor():
    """The processor's name; a speed means little without it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------- read
def open_binary(path):
    """The file opened for reading; raises UserError if that fails."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error


class Lines:
    """Iterates over the lines of a UTF-8 file (BOM, LF or CRLF) and collects what is wrong.

    A BOM further down (files that were joined) is removed as well, with one warning at the end.
    watch: a function that gets all bytes that are read. keep: of the messages on what is wrong.
    """

    def __init__(self, path, watch=None, keep=sys.maxsize):
        self.path, self.watch, self.keep = path, watch, keep
        self.index, self.problems, self.num_problems = 0, [], 0

    def __iter__(self):
        marks, first_mark = 0, 0
        with open_binary(self.path) as file:
            for self.index, raw in enumerate(iter(lambda: self._read(file), b""), 1):
                if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                    self.bad(f"longer than {MAX_LINE} bytes; put one text on a line")
                    while len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                        raw = self._read(file)
                    continue
                raw = raw.removesuffix(b"\n").removesuffix(b"\r")
                if self.index == 1:
                    raw = raw.removeprefix(BOM)
                if BOM in raw:
                    marks, first_mark = marks + raw.count(BOM), first_mark or self.index
                    raw = raw.replace(BOM, b"")
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                    self.bad(f"not valid UTF-8 ({where}); save the file as UTF-8")
                    continue
                yield line
        if marks:
            message = "%s: removed %d byte order mark(s) (U+FEFF) inside the file, first in line %d"
            logger.warning(message, self.path, marks, first_mark)

    def _read(self, file):
        try:
            raw = file.readline(MAX_LINE)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if self.watch:
            self.watch(raw)
        return raw

    def bad(self, why):
        self.num_problems += 1
        if len(self.problems) < self.keep:
            self.problems.append(f"{self.path}:{self.index}: {why}")

    def check(self):
        check_problems(self.problems, self.num_problems)


def check_problems(problems, number=None):
    """Raises UserError that lists what is wrong in a file, up to MAX_REPORTED lines.

    number: of all problems, if `problems` holds only the first ones.
    """
    if problems:
        shown = problems[:MAX_REPORTED]
        if (number or len(problems)) > MAX_REPORTED:
            shown.append(f"... and {(number or len(problems)) - MAX_REPORTED} more such lines")
        raise UserError("\n".join(shown))


def look_of(name):
    """What a reader sees of a name: no compatibility forms, invisible characters or spaces."""
    normal, category = unicodedata.normalize("NFKC", name), unicodedata.category
    return "".join(c for c in normal if not c.isspace() and category(c) not in ("Cc", "Cf"))


def difference(name, other, whose):
    """In code points, how a name differs from another that looks the same; `whose` names that."""

    def code_points(text):
        points = [f"U+{ord(c):04X} {unicodedata.name(c, '')}".rstrip() for c in text]
        return ", ".join(points) or "nothing"

    changes = difflib.SequenceMatcher(None, name, other, autojunk=False).get_opcodes()
    return "; ".join(
        f"it has {code_points(name[a:b])} where {whose} has {code_points(other[c:d])}"
        for tag, a, b, c, d in changes
        if tag != "equal"
    )


def read_labels(path):
    """Label names of `label.txt`; the 0-based line number is the class id.

    Raises UserError for blank lines, duplicates, names that break a row, and an empty file.
    Names that look the same get one warning.
    """
    lines, first_line = Lines(path), {}
    for line in lines:
        name = line.strip()
        if not name:
            lines.bad("blank label name; remove the line")
        elif name in first_line:
            lines.bad(f"label '{name}' is a duplicate of line {first_line[name]}")
        elif "\r" in name:
            lines.bad("carriage return inside a label name; save the file with LF line ends")
        elif "," in name or "\t" in name:
            lines.bad(f"label '{name}' has a comma or tab; rename it")
        else:
            first_line[name] = lines.index
    lines.check()
    if not first_line:
        raise UserError(f"{path}: no labels; write one label name per line")
    check_looks(path, first_line)
    return list(first_line)


def check_looks(path, first_line):
    """Warns once of names of a label file, {name: line}, that a reader cannot tell apart."""
    seen, alike = {}, []
    for name in first_line:
        other = seen.setdefault(look_of(name), name)
        if other != name:
            alike.append((name, other))
    if alike:
        name, other = alike[0]
        message = "%s: %d label name(s) look like another: '%s' (line %d): %s"
        what = difference(name, other, f"line {first_line[other]}")
        logger.warning(message, path, len(alike), name, first_line[name], what)


class Examples(Lines):
    """Iterates over the (text, class ids) of the good lines of a train, dev or test file.

    index: line number of the last one. blank: blank lines, which are skipped. As `Lines` it
    collects what is wrong with the others.
    """

    def __init__(self, path, labels, **settings):
        super().__init__(path, **settings)
        self.labels, self.blank = labels, 0

    def __iter__(self):
        ids, looks, found = {name: i for i, name in enumerate(self.labels)}, {}, False
        for line in super().__iter__():
            fields = line.split("\t")
            if not line.strip() and len(fields) == 1:
                self.blank += 1
            elif len(fields) == 1:
                self.bad("no tab between text and labels (a text without labels ends in a tab)")
            elif len(fields) > 2:
                hint = "write text<TAB>label,label and no tab inside the text"
                if "\r" in line:
                    hint = "and carriage returns inside the line; save the file with LF line ends"
                self.bad(f"{len(fields) - 1} tabs; {hint}")
            elif self.index == 1 and fields == ["text", "label"] and "label" not in ids:
                continue
            else:
                names = [name.strip() for name in fields[1].split(",")] if fields[1].strip() else []
                unknown = [name for name in names if name not in ids]
                if unknown:
                    why = f"it is not among the {len(ids)} label names"
                    looks = looks or {look_of(name): name for name in ids}
                    if known := looks.get(look_of(unknown[0])):
                        why = difference(unknown[0], known, f"the label name '{known}'")
                        why += "; write both the same way"
                    self.bad(f"unknown label '{unknown[0]}'; {why}")
                    continue
                found = True
                yield fields[0].strip(), list(dict.fromkeys(ids[name] for name in names))
        if not found and not self.problems:
            what = "no samples; write one text<TAB>label,label per line"
            self.problems.append(f"{self.path}: {what}")

    def check(self):
        super().check()
        if self.blank:
            logger.warning("%s: skipped %d blank line(s)", self.path, self.blank)


@dataclass(frozen=True)
class Scan:
    """A train, dev or test file: its good lines and what is wrong with the others."""

    texts: list
    label_ids: list  # a list of class ids per text, in the order of the line
    lines: list  # the line number of each text
    blank: int  # blank lines, which readers skip
    problems: list  # one message per bad line


def scan_examples(path, labels):
    """Reads as `read_examples` does but reports bad lines instead of refusing the file."""
    examples, texts, label_ids, lines = Examples(path, labels), [], [], []
    for text, ids in examples:
        texts.append(text)
        label_ids.append(ids)
        lines.append(examples.index)
    return Scan(texts, label_ids, lines, examples.blank, examples.problems)


def read_examples(path, labels):
    """Reads `text<TAB>label,label` lines of a train, dev or test file.

    Returns (texts, label_ids): a list of str and a list of int lists, in the order of the line.
    `text<TAB>` is a sample without labels; blank lines are skipped with one warning; the header
    line that predict.py writes is skipped too, so that its output can be read back.
    Raises UserError that lists up to 10 offending lines.
    """
    examples = Examples(path, labels)
    pairs = list(examples)
    examples.check()
    return [text for text, _ in pairs], [ids for _, ids in pairs]


def read_texts(path):
    """Yields the texts of a data file, one per line, empty ones included (line n answers line n).

    Raises UserError for a missing or empty file and at the first line that is not UTF-8.
    """
    lines = Lines(path)
    for line in lines:
        lines.check()
        yield line
    lines.check()
    if lines.index == 0:
        raise UserError(f"{path}: empty file; write one text per line")
    if lines.index == 1 and "\r" in line:
        message = "%s: one text with %d carriage return(s); if they end lines, save it with LF ends"
        logger.warning(message, path, line.count("\r"))


def check_texts(texts, max_texts, max_text_bytes):
    """Raises ValueError, a line for a server's client, if there are too many texts, or one that is
    too long in UTF-8 or none."""
    if len(texts) > max_texts:
        raise ValueError(f"{len(texts)} texts; send at most {max_texts} in one request")
    for i, text in enumerate(texts):
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"text {i}: invalid Unicode (lone surrogate)") from error
        if size > max_text_bytes:
            raise ValueError(f"text {i} has {size} bytes; at most {max_text_bytes}")


def peeked(items):
    """The same items, the first one read already: a wrong path shows before work is done."""
    items = iter(items)
    return itertools.chain([next(items)], items)


def chunks(items, size):
    """Lists of up to `size` consecutive items of an iterable."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def multi_hot(label_ids, num_labels):
    """0/1 float32 targets [len(label_ids), num_labels]."""
    targets = np.zeros((len(label_ids), num_labels), dtype=np.float32)
    for row, ids in zip(targets, label_ids):
        row[ids] = 1.0
    return targets


# -------------------------------------------------------------------------------------- encode
# ERNIE's tokenizer makes every symbol a token of its own, BERT's does not.
_SYMBOLS = Regex(r"[\p{S}\u00B2\u00B5\u00BA\u00D8\u014B\u01B1\u3007]")


def load_tokenizer(folder, model_folder=None):
    """The tokenizer of a model folder: for ERNIE the same token ids as PaddleNLP's, for BERT as
    Hugging Face's.

    model_folder: where config.json is, if not beside the tokenizer. Raises UserError if the
    vocabulary is missing or does not fit the model.
    """
    path = Path(folder) / "vocab.txt"
    configs = Path(model_folder or folder) / CONFIG_FILE, Path(folder) / "tokenizer_config.json"
    lines = Lines(path)
    vocab = {token: lines.index - 1 for token in lines}
    lines.check()
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; not a BERT-style vocabulary")
    if vocab["[PAD]"] != 0:  # the models mask what has id 0
        raise UserError(f"{path}: [PAD] must be the first line")
    model, config = (read_json(file) if file.exists() else {} for file in configs)
    size = max(vocab.values()) + 1
    if size > (model_size := model.get("vocab_size", size)):
        raise UserError(f"{path}: {size} tokens, the model has {model_size}; not its vocabulary")
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD))
    rule = {"lowercase": config.get("do_lower_case", True), "strip_accents": None}
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if model.get("model_type") == "bert":
        rule["strip_accents"] = config.get("strip_accents")
        rule["handle_chinese_chars"] = config.get("tokenize_chinese_chars", True)
    else:
        split = pre_tokenizers.Split(_SYMBOLS, "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    try:
        tokenizer.normalizer = normalizers.BertNormalizer(**rule)
    except TypeError as error:
        raise UserError(f"{configs[1]}: a tokenizer setting is not true or false") from error
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


# Characters that begin a token whatever stands around them. No brackets: they may belong to a
# special token.
SAFE_CUT = ' \t\n!"#%&(),./:;?，。、；：？！“”（）《》'
IDEOGRAPHS = "\u4e00-\u9fff"  # where the tokenizer takes each as a word
EMOJI = "\U0001f300-\U0001f64f"  # where symbols are tokens of their own
# A word of more than MAX_WORD characters is one [UNK]; no normaliser removes any of these.
LETTER = "[0-9A-Za-z\u00d9-\u00f6\u0400-\u0481\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3]"
LONG_WORD = re.compile(f"({LETTER}{{{MAX_WORD + 1}}}){LETTER}+")
CHARACTERS_PER_TOKEN = 8


def safe_cut(tokenizer):
    """Pattern of the characters in front of which a text may be cut before it is tokenised."""
    characters = re.escape(SAFE_CUT)
    if tokenizer.normalizer.handle_chinese_chars:
        characters += IDEOGRAPHS
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Sequence):
        characters += EMOJI
    return re.compile(f"[{characters}]")


def encode_heads(texts, tokenizer, room, cut):
    """Encodings of the texts, of those with more than `room` tokens perhaps only the first ones.

    The time does not grow with what stands behind them. cut: see safe_cut.
    """
    size = CHARACTERS_PER_TOKEN * room
    texts = [LONG_WORD.sub(r"\1", text) if len(text) > size else text for text in texts]

    def head(text):
        place = cut.search(text, size) if len(text) > size else None
        return text[: place.start()] if place else text

    heads = [head(text) for text in texts]
    result = tokenizer.encode_batch(heads, add_special_tokens=False)
    while short := [
        i for i, text in enumerate(texts) if len(result[i]) <= room and len(heads[i]) < len(text)
    ]:
        size *= 4
        for i in short:
            heads[i] = head(texts[i])
            result[i] = tokenizer.encode(heads[i], add_special_tokens=False)
    return result


class Windows(list):
    """Encoded windows of texts, in their order; `first[i]` is the first window of text i.

    `logits_of` gives one row a text for them: a label's greatest logit in any window of the text.
    """

    def __init__(self):
        self.first = []


def window_starts(length, room):
    """Where windows of `room` tokens begin in a text; the last one ends where the text does."""
    last, step = max(0, length - room), room - int(room * OVERLAP)
    return [min(start, last) for start in range(0, last + step, step)]


def encode(texts, tokenizer, max_seq_length, long_text="truncate"):
    """[CLS] text [SEP] as int32 arrays of at most `max_seq_length` ids.

    The tail of a longer text is cut, or with `long_text="window"` the text becomes several windows
    that overlap. Returns (list of arrays, or Windows; number of texts that were cut or split).
    """
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    encoded, cut = {"truncate": list, "window": Windows}[long_text](), 0
    room, split = max_seq_length - 2, long_text == "window"
    longest, place = max(map(len, texts), default=0), safe_cut(tokenizer)
    for chunk in chunks(texts, min(CHUNK, 1 + ENCODE_CHARACTERS // max(1, longest))):
        for encoding in encode_heads(chunk, tokenizer, sys.maxsize if split else room, place):
            ids = encoding.ids
            cut += len(ids) > room
            if split:
                encoded.first.append(len(encoded))
            for start in window_starts(len(ids), room) if split else [0]:
                window = [cls_id, *ids[start : start + room], sep_id]
                encoded.append(np.array(window, dtype=np.int32))
    return encoded, cut


def log_truncation(cut, total, max_seq_length, long_text="truncate"):
    """Logs how many texts were cut, or split into windows."""
    share = f"{cut} of {total} texts ({100 * cut / max(1, total):.1f}%)"
    message = f"{share} are longer than max_seq_length {max_seq_length}; "
    if cut and long_text == "truncate":
        logger.warning(message + "their tails are cut")
    elif cut:
        logger.info(message + "they were split into windows")


# ---------------------------------------------------------------------------------- encoded sets
class Ragged(Sequence):
    """Integer arrays of different lengths in one: i is values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, values, offsets, lengths):
        self.values, self.offsets, self.lengths = values, offsets, lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        index = range(len(self))[index]
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class EncodedSet(tuple):
    """(token ids, label ids) of the texts of a data file: two `Ragged`, whose arrays stay in the
    files of a folder that `encode_file` has written, so that they take no memory.

    num_tokens: in all texts. cut: texts that were cut. sha256: of the token ids and label ids,
    whatever the file looks like. occurring: the token ids that occur, a sorted array.
    """

    def __new__(cls, folder, meta):
        def parts(name):
            files = [f"{name}.npy", f"{name}_offsets.npy", f"{name}_lengths.npy"]
            return Ragged(*(np.load(folder / f, mmap_mode="r").view(np.ndarray) for f in files))

        self = super().__new__(cls, (parts("tokens"), parts("labels")))
        self.num_tokens, self.cut, self.sha256 = (meta[k] for k in ("tokens", "cut", "sha256"))
        self.occurring = np.load(folder / "occurring.npy")
        return self


def open_set(folder):
    """The EncodedSet in a folder; None if there is none or a file is missing or cut short."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / SET_FILE).read_bytes())
        if all((folder / name).stat().st_size == size for name, size in meta["files"].items()):
            return EncodedSet(folder, meta)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def encode_file(path, labels, tokenizer, max_seq_length, cache):
    """Encodes a data file as `read_examples` and `encode` do, unless the folder `cache` already
    holds a set of the same content, labels, tokenizer and length. Returns the folder of the set.

    Memory does not grow with the number of texts. One process writes to a cache at a time, and a
    set appears whole or not at all. Raises UserError as read_examples does, and if it cannot write.
    """
    path, cache, folder = Path(path), Path(cache), None
    recipe = [SET_FORMAT, sys.byteorder, tokenizers.__version__]
    recipe += [labels, tokenizer.to_str(), max_seq_length]

    def folder_of(digest):
        return cache / hashlib.sha256(json.dumps([*recipe, digest]).encode()).hexdigest()

    def is_there():
        if folder is None or open_set(folder) is None:
            return False
        logger.info("%s: encoded before, in %s", path, folder)
        return True

    if path.is_file():  # a pipe can be read only once
        folder = folder_of(sha256(path))
        if is_there():
            return folder
    try:
        with _made_folder(cache), _cache_lock(cache):
            if is_there():  # by now
                return folder
            if folder is not None and folder.exists():
                logger.warning("%s: damaged, so the texts are encoded anew", folder)
            for leftover in cache.glob(".*.tmp"):  # of a killed process
                shutil.rmtree(leftover)
            temporary = cache / f".{os.getpid()}.tmp"
            temporary.mkdir()
            try:
                logger.info("%s: encoding it into %s", path, cache)
                folder = folder_of(_write_set(temporary, path, labels, tokenizer, max_seq_length))
                if folder.exists():  # damaged, or that of a pipe
                    shutil.rmtree(folder)
                os.replace(temporary, folder)
                fsync(cache)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        hint = "free some space there or give another --cache_dir"
        raise UserError(f"cannot write encoded texts to {cache}: {reason}; {hint}") from error
    return folder


@contextlib.contextmanager
def _cache_lock(cache):
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(cache, timeout=0))
        except Timeout:
            logger.info("%s: waiting for another process that encodes texts", cache)
            stack.enter_context(folder_lock(cache))
        yield


def _write_set(folder, path, labels, tokenizer, max_seq_length):
    """Writes the files of an EncodedSet; returns the SHA-256 of the data file's content."""
    content, ids_digest, cut = hashlib.sha256(), hashlib.sha256(), 0
    occurs = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=bool)
    size = path.stat().st_size if path.is_file() else None
    bar = tqdm(desc=path.name, total=size, unit="B", unit_scale=True, leave=False, disable=None)

    def watch(raw):
        content.update(raw)
        bar.update(len(raw))

    examples = Examples(path, labels, watch=watch, keep=MAX_REPORTED)
    with bar, contextlib.ExitStack() as stack:
        tokens = stack.enter_context(_RaggedWriter(folder, "tokens", len(occurs)))
        classes = stack.enter_context(_RaggedWriter(folder, "labels", len(labels)))
        for chunk in chunks(examples, SET_CHUNK):
            if examples.problems:
                continue  # what counts now is the number of bad lines
            texts, label_ids = zip(*chunk)
            encoded, long = encode(texts, tokenizer, max_seq_length)
            cut += long
            values, lengths = np.concatenate(encoded), lengths_of(encoded)
            tokens.append(values, lengths)
            ids_digest.update(_rows(values, lengths))
            occurs[values] = True
            values = np.fromiter(itertools.chain.from_iterable(label_ids), np.int64)
            classes.append(values, lengths_of(label_ids))
        examples.check()
    label_ids = Ragged(*(np.load(file, mmap_mode="r") for file in classes.paths))
    for start in range(0, len(label_ids), SET_CHUNK):
        stop = min(start + SET_CHUNK, len(label_ids))
        first, last = label_ids.offsets[[start, stop]]
        ids_digest.update(_rows(label_ids.values[first:last], label_ids.lengths[start:stop]))
    np.save(folder / "occurring.npy", np.flatnonzero(occurs))
    for file in folder.iterdir():
        fsync(file)
    meta = {"tokens": tokens.num_values, "cut": cut, "sha256": ids_digest.hexdigest()}
    meta["files"] = {file.name: file.stat().st_size for file in folder.iterdir()}
    with atomic_file(folder / SET_FILE) as file:
        json.dump(meta, file)
    return content.hexdigest()


def _rows(values, lengths):
    """What a set's SHA-256 is taken of: the bytes of int32 [length, *values] of each array."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths + np.arange(len(lengths))
    rows = np.empty(len(values) + len(lengths), dtype=np.int32)
    is_value = np.ones(len(rows), dtype=bool)
    is_value[starts] = False
    rows[starts], rows[is_value] = lengths, values
    return rows.tobytes()


class _RaggedWriter:
    """Appends to the .npy files of a `Ragged` of integers below `limit`."""

    def __init__(self, folder, name, limit):
        self.paths = [folder / f"{name}{part}.npy" for part in ("", "_offsets", "_lengths")]
        self.dtypes = [np.min_scalar_type(limit - 1), np.dtype(np.int64), np.dtype(np.int32)]
        self.num_values = self.num_arrays = 0

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.files = [self.stack.enter_context(open(path, "wb")) for path in self.paths]
        self._write_headers()
        self.files[1].write(bytes(8))  # the first offset
        return self

    def __exit__(self, *error):
        with self.stack:
            self._write_headers()

    def _write_headers(self):
        """NumPy pads a header, so that its size does not depend on the number of elements."""
        sizes = self.num_values, self.num_arrays + 1, self.num_arrays
        for file, dtype, size in zip(self.files, self.dtypes, sizes):
            file.seek(0)
            header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)

    def append(self, values, lengths):
        offsets = self.num_values + np.cumsum(lengths, dtype=np.int64)
        for file, dtype, array in zip(self.files, self.dtypes, (values, offsets, lengths)):
            file.write(array.astype(dtype).tobytes())
        self.num_values, self.num_arrays = int(offsets[-1]), self.num_arrays + len(lengths)


def lengths_of(encoded):
    """The lengths of arrays or lists, an int array."""
    if isinstance(encoded, Ragged):
        return encoded.lengths
    return np.fromiter(map(len, encoded), np.int64, len(encoded))


# --------------------------------------------------------------------------------------- batch
class Batches(Sequence):
    """Index arrays of batches, cut out of the order of all texts when they are asked for.

    numbers: which batches of that order, in which order; a slice is another such sequence.
    """

    def __init__(self, order, batch_size, numbers):
        self.order, self.batch_size, self.numbers = order, batch_size, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Batches(self.order, self.batch_size, self.numbers[index])
        start = self.batch_size * int(self.numbers[index])
        return self.order[start : start + self.batch_size]


def batches(lengths, batch_size, rng=None, batching="sorted", group=1, window=50):
    """Index arrays of one pass over the data, a `Batches`.

    Without `rng` (evaluation) the longest texts come first. With `rng` (training) the order is
    shuffled; `batching="sorted"` then sorts by length inside windows of `window` batches, so that
    little is padded, and shuffles the batches. `group` batches of like length stay side by side for
    the ranks of one training step; the last group is filled up with the first batches.
    """
    lengths = np.asarray(lengths)
    dtype = np.int32 if len(lengths) <= np.iinfo(np.int32).max else np.int64
    numbers = np.arange(-(-len(lengths) // batch_size))
    if rng is None:
        order = np.argsort(-lengths, kind="stable").astype(dtype)
        return Batches(order, batch_size, numbers)
    order = np.arange(len(lengths), dtype=dtype)
    rng.shuffle(order)
    if batching == "sorted":
        # Windows of equal size: a small last one would hold texts of all lengths.
        num_windows = -(-len(order) // (window * batch_size * group))
        for part in np.array_split(order, num_windows):  # views of it
            part[:] = part[np.argsort(lengths[part], kind="stable")]
    groups = np.resize(numbers, (-(-len(numbers) // group), group))  # repeats the first batches
    return Batches(order, batch_size, groups[rng.permutation(len(groups))].ravel())


def pad(sequences):
    """Padded batch: `input_ids` ([PAD] is 0), `token_type_ids` (all 0), int64 [batch, longest]."""
    input_ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, ids in zip(input_ids, sequences):
        row[: len(ids)] = ids
    return {"input_ids": input_ids, "token_type_ids": np.zeros_like(input_ids)}


def run_batches(forward, encoded, batch_size, rank=0, world_size=1, desc=None):
    """Yields (batch index, example indices, logits); of several ranks each runs its own batches.

    With `desc` a progress bar of that name is shown, on a terminal only.
    """
    plan = batches(lengths_of(encoded), batch_size)
    for batch, indices in enumerate(tqdm(plan, desc, leave=False, disable=None if desc else True)):
        if batch % world_size == rank:
            yield batch, indices, forward(**pad([encoded[i] for i in indices]))


def logits_of(forward, encoded, batch_size, num_outputs, desc=None):
    """Logits of all examples in their own order, float32 [examples, num_outputs].

    For `Windows` the examples are the texts, and the windows of all texts are batched together.
    """
    if not isinstance(encoded, Windows):
        logits = np.empty((len(encoded), num_outputs), dtype=np.float32)
        for _, indices, batch_logits in run_batches(forward, encoded, batch_size, desc=desc):
            logits[indices] = batch_logits
        return logits
    text_of = np.searchsorted(encoded.first, np.arange(len(encoded)), side="right") - 1
    # Merged batch by batch, since the logits of all windows may be many times those of the texts.
    logits = np.full((len(encoded.first), num_outputs), -np.inf, dtype=np.float32)
    for _, indices, batch_logits in run_batches(forward, encoded, batch_size, desc=desc):
        np.maximum.at(logits, text_of[indices], batch_logits)
    return logits


# What a Labeller counts: texts; those that were cut or split into windows; that got no label; that
# end in a tab; that end in a tab and label names.
COUNTS = ("texts", "cut", "unlabelled", "bare_tab", "labels_inside")


class Labeller:
    """Texts to labels: encodes, batches, runs, restores the order, decides, counts what was cut.

    forward, tokenizer: see the top of this file and load_tokenizer. info: the ModelInfo whose
    labels, length and decision rule hold. long_text: "truncate" cuts the tails of longer texts,
    "window" labels all of them in overlapping windows. desc: name of the progress bar, None for
    none. num_outputs: columns of what `forward` returns, the labels unless it runs a bare encoder.
    """

    def __init__(
        self,
        forward,
        tokenizer,
        info,
        batch_size=32,
        long_text="truncate",
        desc=None,
        num_outputs=None,
    ):
        self.forward, self.tokenizer, self.info = forward, tokenizer, info
        self.batch_size, self.long_text, self.desc = batch_size, long_text, desc
        self.num_outputs = num_outputs or len(info.labels)
        self.counts = dict.fromkeys(COUNTS, 0)

    def encode(self, texts):
        """Token ids of the texts; see `encode` above."""
        encoded, cut = encode(texts, self.tokenizer, self.info.max_seq_length, self.long_text)
        self.counts["texts"] += len(texts)
        self.counts["cut"] += cut
        return encoded

    def logits(self, texts):
        """Logits in the order of the texts, float32 [texts, classes]."""
        encoded = self.encode(texts)
        return logits_of(self.forward, encoded, self.batch_size, self.num_outputs, self.desc)

    def decide(self, texts):
        """Returns (decisions, probabilities) in the order of the texts, both [texts, classes]."""
        probs = metric.probabilities(self.logits(texts))
        return metric.decode(probs, **self.info.rule), probs

    def names(self, decisions):
        """Label names of each text, in the order of the labels."""
        return metric.label_names(decisions, self.info.labels)

    def predict(self, texts):
        """Returns (label names of each text, probabilities [texts, classes])."""
        decisions, probs = self.decide(texts)
        return self.names(decisions), probs

    def stream(self, texts, rank=0, world_size=1):
        """Yields (texts, decisions, probabilities) of one chunk after the other.

        Memory does not grow with the iterable `texts`, and [texts, classes] of a chunk stays small
        with many labels. Of several ranks each labels the chunks rank, rank + world_size, ...
        """
        self.counts, known = dict.fromkeys(COUNTS, 0), set(self.info.labels)
        for index, chunk in enumerate(chunks(texts, self.chunk_size)):
            if index % world_size == rank:
                decisions, probs = self.decide(chunk)
                self.counts["unlabelled"] += len(chunk) - int(decisions.any(axis=1).sum())
                for tail in (text.rpartition("\t")[2] for text in chunk if "\t" in text):
                    if not tail.strip():
                        self.counts["bare_tab"] += 1
                    elif known.issuperset(map(str.strip, tail.split(","))):
                        self.counts["labels_inside"] += 1
                yield chunk, decisions, probs

    def write(self, file, texts, jsonl, output_scores, rank=0, world_size=1):
        """Writes a row for each of the texts that `stream` gives the rank; see write_rows."""
        labels = self.info.labels
        if rank == 0:
            write_header(file, labels, jsonl, output_scores)
        stream = self.stream(texts, rank, world_size)
        for chunk, decisions, probs in tqdm(stream, unit="chunk", disable=None):
            scores = probs if output_scores else None
            write_rows(file, chunk, self.names(decisions), labels, jsonl, scores)

    @property
    def chunk_size(self):
        return min(CHUNK, max(1, CHUNK_CELLS // len(self.info.labels)))

    def log_truncation(self):
        cut, total = self.counts["cut"], self.counts["texts"]
        log_truncation(cut, total, self.info.max_seq_length, self.long_text)

    def log_doubts(self):
        """A warning for each thing in what `stream` has labelled that was hardly meant."""
        self.log_truncation()
        total, _, unlabelled, bare_tab, labels_inside = self.counts.values()
        if labels_inside and 2 * (bare_tab + labels_inside) > total:
            logger.warning(
                "%d of %d texts look like text<TAB>label,label, and the labels were read as text; "
                "give the texts alone (cut -f1), or measure F1 with analysis/evaluate.py",
                bare_tab + labels_inside,
                total,
            )
        if unlabelled == total and self.info.max_labels != 0:
            logger.warning(
                "%d of %d texts got no label: no probability is above its threshold; train better "
                "(see the F1 on dev), or give each text its nearest label by --min_labels 1",
                unlabelled,
                total,
            )


# ---------------------------------------------------------------------------------- model folders
@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint or bundle says about itself in config.json."""

    labels: list  # label names in the order of the logits
    max_seq_length: int  # [CLS] and [SEP] included
    max_position: int  # the longest sequence that the model can take
    thresholds: list | None  # one per label; None: metric.DEFAULT_THRESHOLD
    model_sha256: str | None = None  # of a bundle's static graph (see model.write_bundle)
    min_labels: int = 0  # of a text
    max_labels: int | None = None  # of a text; None: any number

    def __post_init__(self):
        least, most, count = self.min_labels, self.max_labels, len(self.labels)
        if not 0 <= least <= (count if most is None else most) <= count:
            raise UserError(
                f"min_labels {least}, max_labels {most}: the model has {count} labels; give "
                f"0 <= min_labels <= max_labels <= {count}"
            )

    @property
    def limits(self):
        """min_labels and max_labels as arguments of metric.decode."""
        return {"min_labels": self.min_labels, "max_labels": self.max_labels}

    @property
    def rule(self):
        """How this model decides, as arguments of metric.decode."""
        return {"thresholds": self.thresholds, **self.limits}

    def with_settings(self, max_seq_length=None, **limits):
        """The same with max_seq_length, min_labels, max_labels if they are not None. Raises
        UserError."""
        settings = {"max_seq_length": max_seq_length, **limits}
        info = replace(self, **{k: value for k, value in settings.items() if value is not None})
        check_length(info.max_seq_length, info.max_position)
        return info


def read_json(path):
    """The object in a JSON file; raises UserError if it holds anything else."""
    with open_binary(path) as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def read_model_info(folder):
    """ModelInfo of a checkpoint or bundle; raises UserError if it is none or is broken."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; train.py or export_model.py makes one")
    path = Path(folder) / CONFIG_FILE
    config = read_json(path)
    try:
        names, thresholds = config["id2label"], config.get("thresholds")
        labels = [names[str(i)] for i in range(len(names))]
        if not all(isinstance(name, str) for name in labels):
            raise TypeError("a label name")
        if thresholds is not None:
            thresholds = [float(threshold) for threshold in thresholds]
        lengths = int(config["max_seq_length"]), int(config["max_position_embeddings"])
        limits = config.get("min_labels", 0), config.get("max_labels")
        if type(limits[0]) is not int or type(limits[1]) not in (int, type(None)):
            raise TypeError("min_labels or max_labels")
    except (KeyError, TypeError, ValueError) as error:
        hint = "was the model made by train.py?"
        raise UserError(f"{path}: {error!r} missing or malformed; {hint}") from error
    if thresholds is not None and len(thresholds) != len(labels):
        raise UserError(f"{path}: {len(thresholds)} thresholds for {len(labels)} labels")
    try:
        return ModelInfo(labels, *lengths, thresholds, config.get("model_sha256"), *limits)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def sha256(*paths):
    """Hexadecimal SHA-256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open_binary(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def static_graph(prefix):
    """The files of a static graph, [graph, weights]; Paddle 2 calls the first .pdmodel, Paddle 3
    .json. Raises UserError if one is missing."""
    graphs = [Path(f"{prefix}{suffix}") for suffix in GRAPH_SUFFIXES]
    graph, weights = next(filter(Path.exists, graphs), None), Path(f"{prefix}.pdiparams")
    if graph is None or not weights.exists():
        missing = weights if graph else f"{graphs[0]} or {graphs[1].name}"
        raise UserError(f"{missing}: no such file; export again (--onnx for hosts without Paddle)")
    return [graph, weights]


def static_graph_sha256(prefix):
    """SHA-256 of a bundle's static graph; raises UserError if config.json names another one."""
    files = static_graph(prefix)
    digest = sha256(*files)
    if digest != read_model_info(files[0].parent).model_sha256:
        raise UserError(
            f"{files[0]}, .pdiparams: not the files that config.json beside them describes (cut "
            "short, or of another model); export again"
        )
    return digest


def model_files(folder):
    """What a checkpoint or bundle may hold beside the static graph: no result may replace it."""
    return [Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES)]


def check_labels(folder, name, labels):
    """The label file `name` in `folder` must name the model's labels in the model's order.

    Without a name it is label.txt, if there is one. Raises UserError.
    """
    label_file = Path(folder) / (name or "label.txt")
    if name is None and not label_file.exists():
        return
    pairs = itertools.zip_longest(read_labels(label_file), labels, fillvalue="(nothing)")
    for line, (listed, name) in enumerate(pairs, 1):
        if listed != name:
            why = f"'{listed}' where the model has '{name}'"
            if look_of(listed) == look_of(name):
                why += f" ({difference(listed, name, 'the model')})"
            hint = "give the label file that it was trained with"
            raise UserError(f"{label_file}:{line}: {why}; {hint}")


def check_length(max_seq_length, max_position):
    if not 3 <= max_seq_length <= max_position:
        raise UserError(
            f"--max_seq_length {max_seq_length}: this model takes 3 to {max_position} tokens"
        )


def copy_tokenizer(source, target):
    """Copies the tokenizer files of a model folder; writes those that others need but it lacks."""
    source, target = Path(source), Path(target)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer_config.json").exists():  # PaddleNLP cannot load it without
        config = source / CONFIG_FILE
        kind = read_json(config).get("model_type") if config.exists() else None
        kind = "BertTokenizer" if kind == "bert" else "ErnieTokenizer"
        text = json.dumps({"tokenizer_class": kind, "do_lower_case": True})
        (target / "tokenizer_config.json").write_text(text + "\n")


# ------------------------------------------------------------------------------------------ save
def write_header(file, labels, jsonl, scores):
    """The first line of a TSV result; with `scores` a column per label. JSON lines have none."""
    if not jsonl:
        file.write("\t".join(["text", "label", *(labels if scores else [])]) + "\n")


def cell(text):
    """The text as a cell of a TSV file: tabs and carriage returns become spaces.

    To pandas, Python's csv and whoever reads with universal newlines a lone carriage return ends
    the row. U+000B, U+000C, U+001C to U+001E, U+0085, U+2028 and U+2029, where str.splitlines()
    ends lines, too, end rows in none of them and stay.
    """
    return text.replace("\t", " ").replace("\r", " ")


def write_rows(file, texts, names, labels, jsonl, probs=None):
    """One line per text: its label names and, if given, its probabilities [texts, classes]."""
    for i, (text, given) in enumerate(zip(texts, names)):
        if jsonl:
            record = {"text": text, "labels": given}
            if probs is not None:
                scores = probs[i].tolist()
                record["scores"] = {n: round(p, 6) for n, p in zip(labels, scores)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            scores = [] if probs is None else [f"{p:.6f}" for p in probs[i].tolist()]
            file.write("\t".join([cell(text), ",".join(given), *scores]) + "\n")


def printable(text):
    """Text that names files, as UTF-8 can hold it: under an ASCII locale Python keeps the other
    bytes of a file name as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def native_path(path):
    """`path` by a name that libraries in C++ can open: they take every str as UTF-8, which is not
    what file names are in under other locales. A link to its folder then has a plain name."""
    path = Path(path)
    try:
        if os.fsencode(path) == str(path).encode():
            yield path
            return
    except UnicodeEncodeError:
        pass  # bytes of the name that the locale's encoding does not know
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "link"
        link.symlink_to(os.path.abspath(path.parent), target_is_directory=True)
        yield link / path.name


def fsync(path):
    """Waits until a file or a folder is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path):
    """The file behind `path`, links followed; raises UserError if no file can be there."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is not a regular file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: no folder {path.parent}")
    return path


def check_outputs(outputs, inputs):
    """Raises UserError if a result could not be written, or would replace an input or another."""
    taken = {os.path.realpath(path): "an input of this command" for path in inputs}
    for path in outputs:
        real = str(check_writable(path))
        if real in taken:
            raise UserError(f"cannot write {path}: it is {taken[real]}; give another name")
        taken[real] = "another result"


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """`with atomic_file(path) as file`: the file appears whole when the block ends, or not at all.

    Raises UserError if it can't be written (disk full, no such folder); the old file then stays.
    """
    path = check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) != temporary:
            raise  # an input that could not be read in the block
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; nothing was replaced") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes an object as indented JSON; see atomic_file."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_files(folder, contents):
    """Writes {file name: str or bytes} into a folder, which is made if it is missing.

    All are on the disk before the first takes its place, so a full disk leaves the old ones.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, content in contents.items():
            file = stack.enter_context(atomic_file(Path(folder) / name, "wb"))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def folder_lock(path, name=LOCK_FILE, timeout=-1):
    """One writer at a time: a second process waits here until the first has left the block, or for
    `timeout` seconds, after which filelock.Timeout is raised.

    The lock file in the folder goes at the end; one that a killed process left locks nothing.
    """
    file = Path(path) / name
    with FileLock(file, timeout=timeout):
        try:
            yield
        finally:
            _remove(file)


def _remove(file):
    with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def run_lock(flag, path, run):
    """For a whole run that writes to a folder, which is made if it is missing: raises UserError if
    another process, of this or another machine, is in such a block.

    flag: the one that gave `path`; run: what the other process is told. The lock is not that of
    folder_lock, so that files can be replaced during the run, and readers need not wait for its
    end. A file of its own says who holds it: Windows lets nobody read a locked one.
    """
    path = Path(path)
    holder = path / f"{RUN_FILE}.json"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_made_folder(path))
            stack.enter_context(folder_lock(path, f"{RUN_FILE}.lock", timeout=0))
            stack.callback(_remove, holder)
            me = {"run": run, "process": os.getpid(), "host": platform.node()}
            holder.write_text(json.dumps(me), encoding="utf-8")
        except Timeout:
            raise UserError(
                f"{flag} {path}: {_who_runs(holder)}; wait until it ends, or give another folder"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {path}: {reason}; give another {flag}") from error
        yield


def _who_runs(holder):
    try:
        run = json.loads(holder.read_text(encoding="utf-8"))
        host = "" if run["host"] == platform.node() else f" on {run['host']}"
        return f"a {run['run']} is running here (process {run['process']}{host})"
    except (OSError, ValueError, LookupError, TypeError):  # it is starting or ending just now
        return "another run is writing here"


@contextlib.contextmanager
def _made_folder(path):
    """The folder exists in the block; if it did not before and stays empty, it goes again, with
    those above it that were made for it."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or never made
            for folder in new:
                folder.rmdir()


@contextlib.contextmanager
def atomic_folder(path):
    """`with atomic_folder(path) as temporary`: what the block puts there appears in `path`.

    The files are written inside `path` (it may be a mount point) and then moved one by one. A
    second process that writes to the same folder waits for the first. Raises UserError if it can't
    be written; the old files then stay.
    """
    path = Path(os.path.realpath(path))
    temporary = path / ".new.tmp"
    try:
        with _made_folder(path), folder_lock(path):
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
            temporary.mkdir()
            try:
                yield temporary
                for file in temporary.iterdir():
                    fsync(file)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            _move_files(temporary, path)
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.filename is not None and not path.is_relative_to(error.filename):
            if not Path(error.filename).is_relative_to(path):
                raise  # an input that could not be read in the block
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; nothing was replaced") from error


def _move_files(source, target):
    """If config.json, without which no reader accepts a model folder, is among the files that
    change, the old one goes first and the new one comes last."""
    files = sorted(source.iterdir(), key=lambda file: file.name == CONFIG_FILE)
    changed = [file for file in files if not _same_content(file, target / file.name)]
    try:
        if len(changed) > 1 and files[-1].name == CONFIG_FILE:
            changed = [file for file in files if file in changed or file == files[-1]]
            (target / CONFIG_FILE).unlink(missing_ok=True)
        for file in changed:
            os.replace(file, target / file.name)
        fsync(target)
    except OSError as error:
        what_now = f"the new files are in {source}"
        raise UserError(f"cannot write {target}: {error.strerror}; {what_now}") from error


def _same_content(a, b):
    return b.exists() and filecmp.cmp(a, b, shallow=False)
