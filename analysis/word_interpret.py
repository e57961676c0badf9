"""Which words speak for each predicted label, and which against it; used by word_interpret.ipynb.

Every label has a logit of its own, so every predicted label gets attributions of its own: positive
ones raised this label's logit, negative ones lowered it. Three methods:

* `ig`: integrated gradients (Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks")
  from the text with all words' embeddings at zero; their sum is the difference of the logits.
* `grad`: gradient SHAP, that is gradients at random points of that path with noise (Lundberg and
  Lee 2017, "A Unified Approach to Interpreting Model Predictions"; as in the original's GradShap).
* `lime`: a linear model of the logit around the text, words replaced by [UNK] at random (Ribeiro et
  al. 2016, "Why Should I Trust You?").
"""

import bisect
import html
import sys
from dataclasses import dataclass
from pathlib import Path

import jieba
import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_distances

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")

METHODS = ("ig", "grad", "lime")
STEPS = 64  # points on the path of ig
SHAP_SAMPLES, SHAP_NOISE = 32, 0.1  # points of grad; noise in units of the embeddings' deviation
LIME_SAMPLES, LIME_WIDTH = 500, 0.25  # texts with words replaced; kernel width in cosine distance
BATCH = 32  # points or texts per forward pass


@dataclass(frozen=True)
class Interpretation:
    """The attributions of one text. Words beyond max_seq_length are left out."""

    text: str
    words: list  # of jieba, in the order of the text; joined they are the text
    labels: list  # the explained labels' names
    probs: np.ndarray  # [labels]
    attributions: np.ndarray  # [labels, words], in units of the label's logit

    def key_words(self, row, count):
        """The words that speak most for label `row`, the strongest first."""
        order = np.argsort(-self.attributions[row], kind="stable")
        chosen = [self.words[i] for i in order if self.attributions[row, i] > 0]
        return list(dict.fromkeys(chosen))[:count]


class WordInterpreter:
    """interpreter(text) explains each label that the checkpoint gives to the text.

    Raises UserError for a broken checkpoint, an unknown device, method or label.
    """

    def __init__(self, params_path, device, max_seq_length=None, method="ig", seed=3):
        if method not in METHODS:
            raise UserError(f"method '{method}': use one of {', '.join(METHODS)}")
        model.set_device(device)
        jieba.setLogLevel("WARNING")
        self.model, info = model.load_checkpoint(params_path)
        # Only the embeddings' gradients are wanted. But those are wrong in Paddle 2.6.2 (CPU)
        # where a LayerNorm wants none of its own, be it frozen or through paddle.grad.
        for layer in self.model.sublayers():
            for parameter in layer.parameters(include_sublayers=False):
                parameter.stop_gradient = not isinstance(layer, paddle.nn.LayerNorm)
        self.info = info.with_settings(max_seq_length)
        self.tokenizer = utils.load_tokenizer(params_path)
        self.labeller = utils.Labeller(
            model.dygraph_forward(self.model), self.tokenizer, self.info, BATCH
        )
        self.method, self.seed = getattr(self, f"_{method}"), seed

    def __call__(self, text, labels=None):
        """Interpretation for the named labels, or for the predicted ones.

        A text without predicted labels is explained for its most probable label.
        """
        input_ids, words, word_of = self._encode(text)
        (decisions,), (probs,) = self.labeller.decide([text])
        if labels is None:
            ids = np.flatnonzero(decisions).tolist() or [int(probs.argmax())]
        else:
            unknown = [label for label in labels if label not in self.info.labels]
            if unknown:
                raise UserError(f"unknown label '{unknown[0]}'; it is not among the model's")
            ids = [self.info.labels.index(label) for label in labels]
        attributions = self.method(input_ids, word_of, len(words), ids)
        names = [self.info.labels[i] for i in ids]
        return Interpretation(text, words, names, probs[ids], attributions)

    def _encode(self, text):
        """Token ids with [CLS] and [SEP], words, and for each token between its word's index."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ends = np.cumsum([len(word) for word in jieba.lcut(text)]).tolist()
        # A token belongs to one word: join those that share one (jieba splits full-width digits).
        inside = {i for start, end in encoding.offsets for i in range(start + 1, end)}
        ends = [end for end in ends if end not in inside]
        words = [text[start:end] for start, end in zip([0, *ends], ends)]
        kept = self.info.max_seq_length - 2
        word_of = [bisect.bisect_right(ends, start) for start, _ in encoding.offsets[:kept]]
        (input_ids,) = self.labeller.encode([text])
        if len(encoding.ids) > kept:
            words = words[: word_of[-1] + 1]
        return input_ids, words, np.array(word_of, dtype=np.int64)

    def _along_path(self, input_ids, word_of, num_words, ids, alphas, noise=0.0):
        """Gradients at the scaled embeddings times the embeddings, [labels, words]."""
        layer = self.model.base_model.embeddings.word_embeddings
        input_ids = input_ids.astype("int64")
        embedded = layer(paddle.to_tensor(input_ids)).numpy()
        points = np.repeat(embedded[None], len(alphas), axis=0)
        inner = points[:, 1:-1]  # [CLS] and [SEP] stay as they are
        rng = np.random.default_rng(self.seed)
        inner += noise * embedded.std() * rng.standard_normal(inner.shape, np.float32)
        inner *= np.asarray(alphas, np.float32)[:, None, None]
        gradients = self._gradients(layer, input_ids, points, ids)
        tokens = (gradients * embedded).sum(axis=-1)[:, 1:-1]
        result = np.zeros((len(ids), num_words))
        for row, values in zip(result, tokens):
            np.add.at(row, word_of, values)
        return result

    def _gradients(self, layer, input_ids, points, ids):
        """Mean gradients of the labels' logits at the points, [labels, tokens, hidden].

        points: what the word embeddings are replaced with, [points, tokens, hidden].
        """
        total = 0.0
        for start in range(0, len(points), BATCH):
            leaf = paddle.to_tensor(points[start : start + BATCH], stop_gradient=False)
            hook = layer.register_forward_post_hook(lambda *_, leaf=leaf: leaf)
            try:
                logits = self.model(paddle.to_tensor(np.repeat([input_ids], len(leaf), axis=0)))
            finally:
                hook.remove()
            gradients = []
            for i in ids:
                leaf.clear_gradient()
                (logits[:, i].sum() * model.LOSS_SCALE).backward(retain_graph=True)
                gradients.append(leaf.grad.numpy())
            self.model.clear_gradients()
            total = total + np.stack(gradients).sum(axis=1)
        return total / len(points) / model.LOSS_SCALE

    def _ig(self, *args):
        return self._along_path(*args, (np.arange(STEPS) + 0.5) / STEPS)  # midpoint rule

    def _grad(self, *args):
        alphas = np.random.default_rng(self.seed).random(SHAP_SAMPLES)
        return self._along_path(*args, alphas, noise=SHAP_NOISE)

    def _lime(self, input_ids, word_of, num_words, ids):
        rng = np.random.default_rng(self.seed)
        kept = rng.integers(0, 2, (LIME_SAMPLES, num_words))
        kept[0] = 1  # the text itself
        rows = np.repeat(input_ids[None], LIME_SAMPLES, axis=0)
        unknown = self.tokenizer.token_to_id("[UNK]")
        rows[:, 1:-1] = np.where(kept[:, word_of] > 0, rows[:, 1:-1], unknown)
        logits = utils.logits_of(self.labeller.forward, rows, BATCH, len(self.info.labels))
        if num_words == 0:
            return np.zeros((len(ids), 0))
        distances = cosine_distances(kept, kept[:1])[:, 0]
        weights = np.exp(-((distances / LIME_WIDTH) ** 2) / 2)
        return Ridge(alpha=1.0).fit(kept, logits[:, ids], sample_weight=weights).coef_


def _marked(interpretation, row):
    """The text with each word's background green for the label, red against it."""
    values = interpretation.attributions[row]
    largest = max(np.abs(values).max(initial=0.0), 1e-12)
    marks = []
    for word, value in zip(interpretation.words, values / largest):
        colour = f"hsl({120 if value > 0 else 0}, 75%, {100 - 40 * abs(value):.0f}%)"
        marks.append(f'<span style="background-color: {colour}">{html.escape(word)}</span>')
    return "".join(marks)


def to_html(interpretations, gold, key_words_num=5):
    """A table with a row for each predicted label; gold: one string per text."""
    head = ("Label", "Prediction", "Key words", "Important visualization")
    rows = ["".join(f"<th>{name}</th>" for name in head)]
    for interpretation, label in zip(interpretations, gold):
        for row, (name, prob) in enumerate(zip(interpretation.labels, interpretation.probs)):
            cells = [html.escape(label), f"{html.escape(name)} ({prob:.2f})"]
            cells.append(html.escape(", ".join(interpretation.key_words(row, key_words_num))))
            cells.append(_marked(interpretation, row))
            rows.append("".join(f'<td style="text-align: left">{cell}</td>' for cell in cells))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
