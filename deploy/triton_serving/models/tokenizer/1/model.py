"""Texts to padded token ids; the same ids as utils.load_tokenizer and utils.encode give.

Reads tokenizer.json and settings.json beside it, which make_repository.py wrote from the bundle.
"""

import json
import os
import re

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

# Requests run together only if they are padded to the same length, so lengths are rounded up.
LENGTH_STEP = 16
CHARACTERS_PER_TOKEN = 8


def refusal(message, code):
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse(error=error)


class TritonPythonModel:
    def initialize(self, args):
        folder = pb_utils.get_model_dir()
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as file:
            settings = json.load(file)
        self.max_seq_length = settings["max_seq_length"]
        self.max_text_bytes = settings["max_text_bytes"]
        self.safe_cut, self.long_word = map(
            re.compile, (settings["safe_cut"], settings["long_word"])
        )
        ends = [(token, self.tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        self.tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ends
        )
        self.tokenizer.enable_truncation(self.max_seq_length)
        self.tokenizer.enable_padding(pad_to_multiple_of=LENGTH_STEP)
        # serve.py makes the file `draining` when the server is to stop, and learns from the count
        # how many requests still wait for their answer. This model is the first step of a request,
        # so from then on nothing new is begun and what was begun can be finished.
        self.folder, self.begun, self.count_file = os.environ.get("SEQCLS_DRAIN_DIR"), 0, None
        if self.folder:
            path = os.path.join(self.folder, f"begun.{os.getpid()}")
            self.count_file = open(path, "wb", buffering=0)

    def execute(self, requests):
        """One response per request; a bad text fails its own request only."""
        if self.folder and os.path.exists(os.path.join(self.folder, "draining")):
            # An error object of its own for each: one that is shared crashes Triton 2.51.
            return [refusal("the server is stopping", "UNAVAILABLE") for _ in requests]
        self.count(len(requests))
        responses = [self.respond(request) for request in requests]
        self.count(-sum(response.has_error() for response in responses))
        return responses

    def count(self, requests):
        if self.folder:
            self.begun += requests
            os.pwrite(self.count_file.fileno(), b"%020d" % self.begun, 0)

    def respond(self, request):
        raw = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()[:, 0]
        try:
            input_ids = self.encode([self.check(row, text) for row, text in enumerate(raw)])
        except ValueError as problem:
            return refusal(str(problem), "INVALID_ARG")
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("input_ids", input_ids),
                pb_utils.Tensor("token_type_ids", np.zeros_like(input_ids)),
            ]
        )

    def check(self, row, text):
        """The text as str; raises ValueError, before any work, if it can't be served."""
        if len(text) > self.max_text_bytes:
            limit = f"the limit is {self.max_text_bytes}"
            raise ValueError(f"text {row + 1} of the request has {len(text)} bytes; {limit}")
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{text[error.start]:02x} at position {error.start + 1}"
            raise ValueError(f"text {row + 1} of the request is not valid UTF-8 ({where})")

    def encode(self, texts):
        """Token ids, int64 [texts, length]: a multiple of LENGTH_STEP, at most the model's longest.

        Shorter rows end in [PAD] = 0, which the model masks. What stands far behind the last token
        is not tokenised; see encode_heads in utils.py.
        """
        size = CHARACTERS_PER_TOKEN * self.max_seq_length
        texts = [self.long_word.sub(r"\1", text) if len(text) > size else text for text in texts]
        while True:
            heads = [self.head(text, size) for text in texts]
            encodings = self.tokenizer.encode_batch(heads)
            if all(e.overflowing or h == t for e, h, t in zip(encodings, heads, texts)):
                break
            size *= 4
        input_ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        return input_ids[:, : self.max_seq_length]

    def head(self, text, size):
        """The text up to the first place behind `size` characters where it may be cut."""
        place = self.safe_cut.search(text, size) if len(text) > size else None
        return text[: place.start()] if place else text
