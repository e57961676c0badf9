"""TrustAI 0.1.12 on Paddle 2.6, and the features that its methods work on.

TrustAI wants the whole model and runs it in dygraph. Its example-level methods look at nothing but
the input of the classifier layer, so the encoder runs in this project's own pipeline (a static
graph on the CPU) and TrustAI is given a model that is the classifier layer alone.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import contextlib
import io
import sys
import types
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402
from export_model import load_checkpoint, set_device  # noqa: E402
from predict import fast_forward  # noqa: E402
from utils import UserError  # noqa: E402


def import_trustai():
    """The module `trustai.interpretation`. Raises UserError if it is not installed.

    It imports `layers` from paddle.fluid, which Paddle 2.6 no longer has, for attention and prompt
    methods that are not used here; empty modules of these names satisfy it.
    """
    stubs = {name: types.ModuleType(name) for name in ("paddle.fluid", "paddle.fluid.layers")}
    stubs["paddle.fluid"].layers = stubs["paddle.fluid.layers"]
    sys.modules.update(stubs)
    try:
        import trustai.interpretation
    except ImportError as error:
        hint = "pip install -r analysis/requirements.txt"
        raise UserError(f"TrustAI cannot be imported ({error}); {hint}") from error
    finally:
        for name in stubs:  # nobody else shall take them for the real ones
            del sys.modules[name]
    return trustai.interpretation


@contextlib.contextmanager
def _quiet():
    """TrustAI prints to stdout and shows progress bars of single batches."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class _Classifier(paddle.nn.Layer):
    """The classifier layer under the name by which TrustAI looks for it."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, features):
        return self.classifier(features)


class Encoder:
    """A checkpoint without its classifier: texts to features [texts, hidden], and TrustAI's view.

    Raises UserError for a broken checkpoint, an unknown device, a length it can't take.
    """

    def __init__(self, params_path, device, max_seq_length=None, batch_size=32):
        self.interpretation = import_trustai()
        set_device(device)
        model, self.info = load_checkpoint(params_path)
        self.max_seq_length = max_seq_length or self.info.max_seq_length
        utils.check_length(self.max_seq_length, self.info.max_position)
        self.batch_size = batch_size
        self.tokenizer = utils.load_tokenizer(params_path)
        self.classifier = _Classifier(model.classifier)
        self.hidden_size = model.classifier.weight.shape[0]
        model.classifier = paddle.nn.Identity()
        self.forward = fast_forward(model, device)
        set_device(device)  # the static graph's predictor took the threads away

    def features(self, texts, desc):
        """The classifier's input for each text, float32 [texts, hidden]."""
        encoded, cut = utils.encode(texts, self.tokenizer, self.max_seq_length)
        utils.warn_truncated(cut, len(texts), self.max_seq_length)
        return utils.logits_of(self.forward, encoded, self.batch_size, self.hidden_size, desc)

    def _predict(self, features, classifier_layer_name, paddle_model):
        """TrustAI's predict_fn; its own, with softmax and arg-max, goes through Python lists."""
        probs = paddle.nn.functional.softmax(paddle_model(features), axis=1)
        return features, probs, paddle.argmax(probs, axis=1)

    def similarity(self, candidates):
        """FeatureSimilarityModel of features [candidates, hidden], the training set's usually."""
        with _quiet():
            return self.interpretation.FeatureSimilarityModel(
                self.classifier, [paddle.to_tensor(candidates)], predict_fn=self._predict
            )

    def representer_points(self, features):
        """The weights [texts, classes] of RepresenterPointModel on features [texts, hidden]."""
        with _quiet():
            model = self.interpretation.RepresenterPointModel(
                self.classifier, [paddle.to_tensor(features)], predict_fn=self._predict
            )
        return model.weight_matrix.numpy()


def nearest(similarity, features, number, desc):
    """The `number` candidates of greatest cosine similarity for each row of features.

    Returns (indexes, scores), both [rows, number], the most similar first. All candidates are
    ranked if there are fewer.
    """
    number = min(number, len(similarity.train_feature))
    indexes = np.empty((len(features), number), dtype=np.int64)
    scores = np.empty((len(features), number), dtype=np.float32)
    for i in tqdm(range(len(features)), desc, leave=False, disable=None):
        (result,) = similarity.interpret(paddle.to_tensor(features[i : i + 1]), sample_num=number)
        indexes[i], scores[i] = result.pos_indexes, result.pos_scores
    return indexes, scores
