"""Reads the exports of doccano and Label Studio: what of a record is text, what are labels.

The content decides which form a record has; `parse` knows them all.
"""

import codecs
import io
import json
import re
import sys
import zipfile
import zlib
from typing import NamedTuple

import utils
from utils import UserError, logger

PIECE = 1 << 20  # bytes of an export that are read at a time
SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # a byte order mark stands inside after `cat a b`
DECODER = json.JSONDecoder()
TEXT_FIELDS = ("data", "text")
# `cats` stands beside the entities of doccano's intent detection.
LABEL_FIELDS = ("label", "labels", "cats", "choice", "choices")
HINT = "export JSONL from doccano or JSON from Label Studio"
# Label Studio's JSON-MIN puts the task's data first, then `id`, the controls, and these:
AFTER_CONTROLS = ("annotator", "annotation_id", "created_at", "updated_at", "lead_time")


class Record(NamedTuple):
    where: str  # for messages
    task: str  # the same for all records of a task
    fields: dict  # what may hold the text
    answers: list  # {field or control: value} of each annotator; without any, nobody answered
    kind: str  # "task" and "min": answers have lists of names (None: no choices); else "plain"
    is_truth: bool = False  # the answers outvote the other records of the task


def read(paths):
    """[Record] of the files; raises UserError that lists what is wrong in them."""
    records, problems, empty = [], [], []
    for name, file in open_files(paths):
        found = len(records) + len(problems)
        for where, value in json_records(name, file, problems):
            try:
                records.append(parse(where, value))
            except ValueError as error:
                problems.append(f"{where}: {error}")
        if len(records) + len(problems) == found:
            empty.append(name)
    utils.check_problems(problems)
    if not records:
        hint = "annotate or approve texts, then export again"
        raise UserError(f"{', '.join(empty)}: empty, no record in it; {hint}")
    for name in empty:
        logger.warning("%s is empty: no record in it.", name)
    return records


def open_files(paths):
    """Yields (name for messages, open binary file); a zip archive gives the files in it."""
    for path in paths:
        with utils.open_binary(path) as file:
            if file.peek(4)[:4] != b"PK\x03\x04":
                yield path, file
                continue
            try:
                with zipfile.ZipFile(io.BytesIO(file.read())) as archive:
                    for name in archive.namelist():
                        if not name.endswith("/") and not name.startswith("__MACOSX/"):
                            yield f"{path}/{name}", io.BytesIO(archive.read(name))
            except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
                reason = str(error).rstrip(".")
                raise UserError(f"{path}: {reason}; unpack it and give the files") from error


# ------------------------------------------------------------------------------------------ JSON
class Text:
    """A UTF-8 file as text, of which only the piece that is being parsed is in memory."""

    def __init__(self, path, file):
        self.path, self.file, self.ended = path, file, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.line = "", 0, 1

    def more(self):
        """Reads another piece; False at the end of the file."""
        if self.ended:
            return False
        self.text, self.position = self.text[self.position :], 0
        data = self.file.read(max(PIECE, len(self.text)))
        try:
            self.text += self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            before = self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            byte = f"byte 0x{error.object[error.start]:02x}"
            message = f"not valid UTF-8 ({byte}); save the file as UTF-8"
            raise UserError(f"{self.path}:{self.line + before}: {message}") from error
        self.ended = not data
        return not self.ended

    def go_to(self, position):
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek(self):
        """The next character that is no space, or an empty string at the end."""
        while True:
            self.go_to(SPACE.match(self.text, self.position).end())
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]

    def value(self):
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError):
                if not self.more():
                    raise
            else:
                self.go_to(end)
                return value

    def skip_line(self):
        """Goes on where a line begins with an object or array."""
        while self.more():
            pass
        start = re.compile(r"\n[\[{]").search(self.text, self.position)
        self.go_to(start.start() + 1 if start else len(self.text))


def json_records(path, file, problems):
    """Yields (where, value) for each record of a file of JSON objects and arrays of records."""
    text, first = Text(path, file), True
    while char := text.peek():
        try:
            if char == "[":
                yield from array_elements(path, text)
            elif char == "{":
                where = f"{path}:{text.line}"
                yield where, text.value()
            else:
                raise ValueError("")
            first = False
        except (ValueError, RecursionError) as error:
            if first:
                raise UserError(not_json(path, text, char, error)) from error
            problems.append(f"{path}:{text.line}: not JSON; {HINT}")
            text.skip_line()


def not_json(path, text, char, error):
    """The message for a file that does not begin with a JSON value."""
    if text.text.lstrip('\ufeff"').startswith("__label__"):
        return f"{path}: a fastText file, in which labels and text cannot be told apart; {HINT}"
    if char not in "[{":
        return f"{path}:{text.line}: not JSON; {HINT}"
    n = text.line + text.text.count("\n", text.position, getattr(error, "pos", text.position))
    return f"{path}:{n}: not JSON ({getattr(error, 'msg', error)}); export again"


def array_elements(path, text):
    text.go_to(text.position + 1)
    if text.peek() == "]":
        text.go_to(text.position + 1)
        return
    for n in range(1, sys.maxsize):
        value = text.value()
        number = value.get("id") if isinstance(value, dict) else None
        yield f"{path}: record {n}" if number is None else f"{path}: task {number}", value
        char = text.peek()
        if char not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position)
        text.go_to(text.position + 1)
        if char == "]":
            return
        text.peek()


# --------------------------------------------------------------------------------------- records
def parse(where, record):
    """The Record of a JSON value; raises ValueError for what is no annotation of a text."""
    if not isinstance(record, dict):
        raise ValueError(f"{shortened(record)} is no record with a text and labels; {HINT}")
    task = record.get("task")
    if "result" in record and task is not None:  # an annotation in Label Studio's target storage
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise ValueError("an annotation without its task's data; export JSON from Label Studio")
        return parse_task(where, task, [record])
    if isinstance(record.get("data"), dict):  # `completions` before Label Studio 1.0
        return parse_task(where, record, record.get("annotations", record.get("completions")))
    if isinstance(record.get("annotations"), list):  # doccano before 1.3
        answers = doccano_answers(record)
        fields = {name: value for name, value in record.items() if name != "annotations"}
    elif "annotator" in record:
        return parse_json_min(where, record)
    else:
        fields = {sys.intern(name): value for name, value in record.items()}
        answers = [fields]
    return Record(where, repr(record.get("id", where)), fields, answers, "plain")


def parse_task(where, task, annotations):
    """A task of Label Studio; an annotation that a reviewer marked as the truth outvotes others."""
    given = annotations if isinstance(annotations, list) else []
    if not all(isinstance(annotation, dict) for annotation in given):
        raise ValueError("annotations are numbers; export JSON with the annotations themselves")
    given = [annotation for annotation in given if not annotation.get("was_cancelled")]
    truth = [annotation for annotation in given if annotation.get("ground_truth")]
    answers = []
    for annotation in truth or given:
        answers.append({})
        for result in annotation.get("result") or []:
            if isinstance(result, dict) and "from_name" in result:  # not so for relations
                control, names = sys.intern(str(result["from_name"])), names_of(result.get("value"))
                before = answers[-1].setdefault(control, names)
                if before is not names and names is not None:
                    answers[-1][control] = (before or []) + names
    fields = {sys.intern(name): value for name, value in task["data"].items()}
    return Record(where, repr(task.get("id", where)), fields, answers, "task", bool(truth))


def parse_json_min(where, record):
    """One annotation of a task, or, with `annotation_id` null, a task that nobody annotated."""
    names = list(record)
    first, last = names.index("id") + 1 if "id" in record else 0, names.index("annotator")
    # Another program may have put the keys in another order; then any field may be a control.
    between = names[first:last] + names[last + 1 :] if 0 < first <= last else names
    fields = {name: record[name] for name in names if name not in AFTER_CONTROLS}
    answer = {
        sys.intern(name): names_of(record[name])
        for name in between
        if name not in ("id", *TEXT_FIELDS, *AFTER_CONTROLS)
    }
    answers = [answer] if record.get("annotation_id", 0) is not None else []
    return Record(where, repr(record.get("id", where)), fields, answers, "min")


def doccano_answers(record):
    """One answer for each user; neither annotated nor approved is no answer."""
    by_user = {}
    for given in record["annotations"]:
        if not isinstance(given, dict) or not ("label_name" in given or "start_offset" in given):
            raise ValueError("annotations hold label numbers; export with text labels from doccano")
        name = given if "start_offset" in given else given["label_name"]
        by_user.setdefault(given.get("user"), []).append(name)
    if not by_user and record.get("annotation_approver", "") is not None:
        by_user[None] = []
    return [{"label": names} for names in by_user.values()]


def names_of(value):
    """The names in the value of a control, or None if it is neither of Choices nor of Taxonomy.

    A name of a taxonomy is a tuple, its path.
    """
    names = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and isinstance(item.get("choices"), list):
            names += item["choices"]
        elif isinstance(item, dict) and isinstance(item.get("taxonomy"), list):
            names += map(as_path, item["taxonomy"])
        elif isinstance(item, str):
            names.append(item)
        elif isinstance(item, list) and item and all(isinstance(part, str) for part in item):
            names.append(tuple(item))
        else:
            return None
    return names


def as_path(item):
    return tuple(item) if isinstance(item, list) and item else item


def has_choices(value):
    return isinstance(value, dict) and isinstance(value.get("choices"), list)


def plain_names(value):
    """The items of a field, with the choices of Label Studio's among them."""
    names = []
    for item in value if isinstance(value, list) else [value]:
        if has_choices(item):
            names += item["choices"]
        else:
            names.append(item)
    return names


def shortened(value):
    return json.dumps(value, ensure_ascii=False)[:40]


# ---------------------------------------------------------------------------------------- fields
def find_label_fields(records, source, given, text_field):
    """(controls of Label Studio, fields of other records) that hold the labels.

    A label counts if any of the controls has it, but only the first field that a record has counts,
    unless they are `given`. Raises UserError where it cannot be known which ones are meant.
    """
    controls, fields = {}, {}  # the kinds of value that each has
    for record in records:
        seen = fields if record.kind == "plain" else controls
        for answer in record.answers:
            for name, value in answer.items():
                seen.setdefault(name, set()).add(kind_of(value, record.kind))
    if not any(record.answers for record in records):
        raise UserError(f"{source}: nobody has annotated a text; annotate, then export again")
    if given:
        if unknown := [name for name in given if name not in {**controls, **fields}]:
            known = ", ".join(controls or fields) or "none"
            message = f"no field {', '.join(unknown)} among the annotations, only {known}"
            raise UserError(f"{source}: {message}; correct --label_field")
        return given, given
    # A text box that was filled in once looks like a single choice there.
    choices = [n for n, kinds in controls.items() if is_choices(kinds) and n != text_field]
    in_fields = [name for name, kinds in fields.items() if "choices" in kinds]
    if len(choices) > 1 or len(in_fields) > 1:
        names = ", ".join(choices if len(choices) > 1 else in_fields)
        raise UserError(f"{source}: choices in {names}; name one or more with --label_field")
    if controls and not choices:
        hint = "label whole texts with <Choices> or <Taxonomy>"
        raise UserError(f"{source}: no choices in {', '.join(controls)}; {hint}")
    if not choices and any(record.kind == "min" and record.answers for record in records):
        hint = "export JSON, where annotations and data are apart"
        raise UserError(f"{source}: no annotation between id and annotator; {hint}")
    in_fields = in_fields or LABEL_FIELDS
    if fields and not any(name in fields for name in in_fields):
        others = [name for name in fields if name not in ("id", text_field or "text", "data")]
        hint = f"name the right one with --label_field: {', '.join(others)}"
        hint = hint if others else "export the labels, too"
        wanted = f"{', '.join(LABEL_FIELDS[:-1])} or {LABEL_FIELDS[-1]}"
        raise UserError(f"{source}: no labels in field {wanted}; {hint}")
    return choices, in_fields


def kind_of(value, kind):
    if kind == "plain":
        items = value if isinstance(value, list) else [value]
        return "choices" if any(map(has_choices, items)) else "unknown"
    if value is None:
        return "other"
    return "choices" if len(value) != 1 or isinstance(value[0], tuple) else "name"


def is_choices(kinds):
    return "choices" in kinds or "name" in kinds and "other" not in kinds


def labels_of(record, answer, controls, fields, joined):
    """The label names of an answer, or None if it is no answer to that question."""
    if record.kind == "plain":
        found = [plain_names(answer[name]) for name in fields if answer.get(name) is not None]
        return (sum(found, []) if joined else found[0]) if found else None
    names = []
    for name in controls:
        if record.kind == "min" and name in record.fields and name not in answer:
            hint = "export JSON, where they are apart"
            raise ValueError(f"field {name} of the data is called like the annotation; {hint}")
        if name in answer and answer[name] is None:
            raise ValueError(f"{name} holds no choices; export text classification, not spans")
        names += answer.get(name, [])
    return names


def find_text_fields(records, given, label_fields):
    """Names of the fields that may hold the text; the first that a record has counts."""
    wanted = [given] if given else list(TEXT_FIELDS)
    answered = [record for record in records if record.answers]
    if any(isinstance(record.fields.get(name), str) for record in answered for name in wanted):
        return wanted
    found = dict.fromkeys(name for record in answered for name in strings(record, label_fields))
    if len(found) == 1 and not given:
        return list(found)
    raise UserError(f"{answered[0].where}: {no_text(wanted, found)}")


def text_of(record, text_fields, label_fields):
    """The text of a record; raises ValueError if it has none."""
    for name in text_fields:
        if isinstance(record.fields.get(name), str):
            return record.fields[name]
    raise ValueError(no_text(text_fields, strings(record, label_fields)))


def no_text(wanted, found):
    hint = f"name the right one with --text_field: {', '.join(found)}"
    hint = hint if found else "delete the record, which has no text at all"
    return f"no text in field {' or '.join(wanted)}; {hint}"


def strings(record, label_fields):
    """Names of the fields of a record that may be its text."""
    names = [name for name, value in record.fields.items() if isinstance(value, str)]
    if record.kind == "task":
        return names
    data = [name for name in names if not any(name in answer for answer in record.answers)]
    return data or [name for name in names if name not in label_fields]
