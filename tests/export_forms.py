"""Exports of doccano and Label Studio, made of samples (text, label names)."""

import io
import json
import zipfile

GOOD = '{"id": 1, "data": "好", "label": ["甲"]}\n'
TEXTS = [("要求离婚", ["离婚"]), ("分割房屋", ["财产", "债务"]), ("没有争议", [])]


def as_doccano(samples, text="data", label="label", first=1):
    return [{"id": n, text: t, label: names} for n, (t, names) in enumerate(samples, first)]


def as_jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def annotation(names, **flags):
    value = {"choices": names}
    result = [{"from_name": "要素", "to_name": "text", "type": "choices", "value": value}]
    return {"id": 7, "was_cancelled": False, "result": result if names else [], **flags}


def task(text, *annotations, number=1):
    return {"id": number, "annotations": list(annotations), "data": {"text": text}}


def as_label_studio(samples):
    return [task(t, annotation(names), number=n) for n, (t, names) in enumerate(samples, 1)]


def as_json_min(samples):
    """One choice is a plain name there; without any the field is missing."""
    for number, (text, names) in enumerate(samples, 1):
        value = {"choices": names} if len(names) > 1 else (names or [None])[0]
        record = {"text": text, "id": number, "annotator": 1, "updated_at": "2022-08-22T10:00:00Z"}
        yield {**record, "要素": value} if names else record


EXPORTS = {
    "doccano new": lambda samples: as_jsonl(as_doccano(samples)),
    "doccano old": lambda samples: as_jsonl(as_doccano(samples, "text")),
    "doccano labels": lambda samples: as_jsonl(as_doccano(samples, "text", "labels")),
    "doccano JSON": lambda samples: json.dumps(as_doccano(samples)),
    "Label Studio JSON": lambda samples: json.dumps(as_label_studio(samples), indent=1),
    "Label Studio JSON-MIN": lambda samples: json.dumps(list(as_json_min(samples))),
}


def as_zip(**contents):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._anno1.jsonl", b"\x00\x05")
        for name, content in contents.items():
            archive.writestr(f"{name}.jsonl", content)
    return target.getvalue()


def samples_of(path):
    return [
        (text, names.split(",") if names else [])
        for text, names in (line.split("\t") for line in path.read_text("utf-8").splitlines())
    ]
