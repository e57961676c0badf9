"""TrustAI 0.1.12 on Paddle 2.6, and the features that its methods work on.

TrustAI wants the whole model and runs it in dygraph. Its example-level methods look at nothing but
the input of the classifier layer, so the encoder runs in this project's own pipeline (a static
graph on the CPU) and TrustAI is given a model that is the classifier layer alone.
"""

import contextlib
import io
import sys
import types
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from utils import UserError

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")


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
        for name in stubs:  # other packages must not find them
            del sys.modules[name]
    return trustai.interpretation


class Encoder:
    """A checkpoint without its classifier: texts to features [texts, hidden], and TrustAI's view.

    Raises UserError for a broken checkpoint, an unknown device, a length that the model can't take.
    """

    def __init__(self, params_path, device, max_seq_length=None, batch_size=32):
        self.info = utils.read_model_info(params_path).with_settings(max_seq_length)
        self.tokenizer, self.batch_size = utils.load_tokenizer(params_path), batch_size
        self.interpretation = import_trustai()
        model.set_device(device)
        encoder, _ = model.load_checkpoint(params_path)
        self.hidden_size = encoder.classifier.weight.shape[0]
        # TrustAI looks for the layer by this name.
        self.classifier = paddle.nn.Sequential(("classifier", encoder.classifier))
        encoder.classifier = paddle.nn.Identity()
        self.forward = model.fast_forward(encoder, device)
        model.set_device(device)  # the static graph's predictor took the threads away

    def features(self, texts, desc):
        """The classifier's input for each text, float32 [texts, hidden]."""
        settings = {"desc": desc, "num_outputs": self.hidden_size}
        runner = utils.Labeller(
            self.forward, self.tokenizer, self.info, self.batch_size, **settings
        )
        features = runner.logits(texts)
        runner.log_truncation()
        return features

    def _explain(self, name, features):
        """One of TrustAI's explainers of the classifier layer, on features [texts, hidden].

        It prints to stdout and shows progress bars of single batches, which is suppressed.
        """
        data = [paddle.to_tensor(features)]
        explainer = getattr(self.interpretation, name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return explainer(self.classifier, data, predict_fn=self._predict)

    def _predict(self, features, classifier_layer_name, paddle_model):
        """TrustAI's predict_fn; its own, with softmax and arg-max, goes through Python lists."""
        probs = paddle.nn.functional.softmax(paddle_model(features), axis=1)
        return features, probs, paddle.argmax(probs, axis=1)

    def similarity(self, candidates):
        """FeatureSimilarityModel of features [candidates, hidden], the training set's usually."""
        return self._explain("FeatureSimilarityModel", candidates)

    def representer_points(self, features):
        """The weights [texts, classes] of RepresenterPointModel on features [texts, hidden]."""
        return self._explain("RepresenterPointModel", features).weight_matrix.numpy()


def nearest(similarity, features, k, desc):
    """The k candidates of greatest cosine similarity for each row of features.

    Returns (indices, scores), both [rows, k], the most similar first. All candidates are ranked if
    there are fewer.
    """
    k = min(k, len(similarity.train_feature))
    indices = np.empty((len(features), k), dtype=np.int64)
    scores = np.empty((len(features), k), dtype=np.float32)
    for i in tqdm(range(len(features)), desc, leave=False, disable=None):
        (result,) = similarity.interpret(paddle.to_tensor(features[i : i + 1]), sample_num=k)
        indices[i], scores[i] = result.pos_indexes, result.pos_scores
    return indices, scores
