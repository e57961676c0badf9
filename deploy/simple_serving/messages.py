"""The JSON of POST /predict: checked by hand, which is fast, and described for OpenAPI."""

import json
from dataclasses import dataclass, replace

import numpy as np
from loaded_models import thresholds_of

import metric
import utils
from utils import UserError

KEYS = "texts", "text", "model", "all_scores", "thresholds", "min_labels", "max_labels"
DIGITS = 6  # of a score, as in predict.py's files


class InvalidError(Exception):
    """Arguments: the status and one line for the client."""


@dataclass
class Predict:
    """A checked request."""

    name: str
    model: object  # a Predictor
    texts: list
    all_scores: bool
    thresholds: object  # float32 [classes], or None for the model's
    info: object  # a ModelInfo whose limits hold


def _constant(name):
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(parse_constant=_constant)  # Python's own takes NaN and Infinity


def parse_request(body, models, limits):
    """models: {name: Predictor}, the first is the default; limits: .max_texts, .max_text_bytes.
    Raises InvalidError."""
    try:
        value = DECODER.decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidError(400, f"the body is not JSON in UTF-8: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise invalid('send a JSON object such as {"texts": ["..."]}')
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise invalid(f"unknown key {shown(unknown[0])}; known: {', '.join(KEYS)}")
    name = value.get("model", next(iter(models)))
    if not isinstance(name, str) or name not in models:
        raise invalid(f"unknown model {shown(name)}; this server has {', '.join(models)}")
    all_scores = value.get("all_scores", False)
    if not isinstance(all_scores, bool):
        raise invalid("all_scores must be true or false")
    model = models[name]
    texts, info = texts_of(value, limits), limits_of(value, model.info)
    return Predict(name, model, texts, all_scores, thresholds_in(value, model.info), info)


def texts_of(value, limits):
    if ("texts" in value) == ("text" in value):
        raise invalid("send either texts, a list of strings, or text, a string")
    texts = value["texts"] if "texts" in value else [value["text"]]
    if not isinstance(texts, list):
        raise invalid("texts must be a list of strings")
    if not texts:
        raise invalid("texts is empty; send at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise invalid(f"text {i} is not a string")
    try:
        utils.check_texts(texts, limits.max_texts, limits.max_text_bytes)
    except ValueError as error:
        raise invalid(str(error)) from error
    return texts


def limits_of(value, info):
    """The ModelInfo with min_labels and max_labels of the request."""
    given = {name: value[name] for name in ("min_labels", "max_labels") if name in value}
    if not given:
        return info
    for name, number in given.items():
        if type(number) is not int or not 0 <= number <= len(info.labels):
            raise invalid(f"{name} must be a whole number from 0 to {len(info.labels)}")
    try:
        return replace(info, **given)
    except UserError as error:
        raise invalid(str(error)) from error


def thresholds_in(value, info):
    """The request's thresholds, float32 [classes]; None if it has none."""
    if "thresholds" not in value:
        return None
    given = value["thresholds"]
    if not isinstance(given, dict):
        return np.full(len(info.labels), threshold(given), dtype=np.float32)
    index = {label: i for i, label in enumerate(info.labels)}
    thresholds = np.array(thresholds_of(info), dtype=np.float32)
    for label, number in given.items():
        if label not in index:
            raise invalid(f"thresholds: unknown label {shown(label)}; GET /info lists them")
        thresholds[index[label]] = threshold(number)
    return thresholds


def threshold(number):
    if type(number) not in (int, float) or not 0 <= number <= 1:
        raise invalid("thresholds must be a number from 0 to 1, or an object of label: number")
    return number


def invalid(message):
    return InvalidError(422, message)


def shown(value):
    """A value of the client as one short line."""
    text = json.dumps(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error):
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:200]


def reply(request, probs, cut):
    """The body of the answer. probs: [texts, classes]; cut: a bool for each text."""
    labels, info = request.model.info.labels, request.info
    thresholds = info.thresholds if request.thresholds is None else request.thresholds
    decisions = metric.decode(probs, thresholds, **info.limits)
    results = []
    for row, given, was_cut in zip(probs, decisions, cut):
        named = [(labels[i], round(float(row[i]), DIGITS)) for i in np.flatnonzero(given)]
        result = {"labels": [{"label": n, "score": s} for n, s in named], "cut": was_cut}
        if request.all_scores:
            scores = row.tolist()
            result["scores"] = {n: round(s, DIGITS) for n, s in zip(labels, scores)}
        results.append(result)
    sha256 = request.model.info.model_sha256
    value = {"model": request.name, "model_sha256": sha256, "results": results}
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


# --------------------------------------------------------------------- as OpenAPI describes it
def _object(required, **properties):
    rule = {"required": required} if required else {}
    return {"type": "object", "properties": properties, **rule}


STRING, SCORE = {"type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}
COUNT = {"type": "integer", "minimum": 0}
REQUEST = {
    **_object(
        [],
        texts={"type": "array", "items": STRING, "minItems": 1, "example": ["婚后生育一子。"]},
        text={**STRING, "description": "one text, in place of texts"},
        model={**STRING, "description": "name of a model; default: the first"},
        all_scores={"type": "boolean", "default": False},
        thresholds={
            "oneOf": [SCORE, {"type": "object", "additionalProperties": SCORE}],
            "description": "for all labels, or by label; default: the model's",
        },
        min_labels={**COUNT, "description": "of a text; default: the model's"},
        max_labels={**COUNT, "description": "of a text; default: the model's"},
    ),
    "additionalProperties": False,
    "example": {"texts": ["婚后生育一子。", "准予离婚。"]},
}
REPLY = _object(
    ["model", "model_sha256", "results"],
    model=STRING,
    model_sha256=STRING,
    results={
        "type": "array",
        "items": _object(
            ["labels", "cut"],
            labels={
                "type": "array",
                "items": _object(["label", "score"], label=STRING, score=SCORE),
            },
            cut={"type": "boolean", "description": "the text is longer than the model takes"},
            scores={"type": "object", "additionalProperties": SCORE},
        ),
    },
)
ERROR = _object(["error"], error=STRING)
ERRORS = {
    400: "not JSON, or not HTTP",
    408: "the request did not arrive in time",
    413: "the body is too large",
    422: "a value or key is not allowed",
    429: "the queue is full; retry later",
    503: "stopping, too many connections, or waited too long; retry later",
}


def _json(schema):
    return {"application/json": {"schema": schema}}


OPENAPI = {
    "requestBody": {"required": True, "content": _json(REQUEST)},
    "responses": {
        "200": {"description": "labels, in the order of the texts", "content": _json(REPLY)},
        **{str(s): {"description": d, "content": _json(ERROR)} for s, d in ERRORS.items()},
    },
}
