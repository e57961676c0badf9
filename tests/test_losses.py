"""train.py --loss, --pos_weight and --metric_for_best: the formulas and what is kept."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from test_train import argv, records, same_weights, weights

import model as models
import train
from model import build_model

LOGITS = np.array([[-9.0, -1.0, 0.0, 0.5], [3.0, 12.0, -4.0, -0.2]], dtype=np.float32)
TARGETS = np.array([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=np.float32)


def value(name, logits=LOGITS, targets=TARGETS, pos_weight=None):
    loss = train.make_loss(name, pos_weight)
    return float(loss(paddle.to_tensor(logits), paddle.to_tensor(targets)))


@pytest.mark.parametrize("pos_weight", [None, [1.0, 2.0, 3.0, 4.0]], ids=["plain", "weighted"])
def test_formulas(pos_weight):
    """As the papers write them, in float64."""
    probs = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    weight = np.array(pos_weight or [1.0] * 4)
    shifted = np.maximum(probs - 0.05, 0)
    terms = {
        "bce": (np.log(probs), np.log(1 - probs)),
        "focal": ((1 - probs) ** 2 * np.log(probs), probs**2 * np.log(1 - probs)),
        "asl": (np.log(probs), shifted**4 * np.log(1 - shifted)),
    }
    for name, (positive, negative) in terms.items():
        expected = -np.mean(TARGETS * weight * positive + (1 - TARGETS) * negative)
        array = None if pos_weight is None else weight.astype(np.float32)
        assert value(name, pos_weight=array) == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("name", ["bce", "focal", "asl"])
def test_extreme_logits_have_finite_gradients(name):
    logits = paddle.to_tensor([[-200.0, 200.0, -200.0, 200.0, 0.0]], stop_gradient=False)
    loss = train.make_loss(name)(logits, paddle.to_tensor([[1.0, 0.0, 0.0, 1.0, 1.0]]))
    loss.backward()
    assert np.isfinite(float(loss)) and np.isfinite(logits.grad.numpy()).all()
    assert logits.grad.numpy()[0, 0] < 0 <= logits.grad.numpy()[0, 1]


def test_easy_negatives_count_nothing_in_asl():
    logits = paddle.to_tensor([[-3.5, -2.0]], stop_gradient=False)  # probabilities 0.03 and 0.12
    train.make_loss("asl")(logits, paddle.zeros([1, 2])).backward()
    assert logits.grad.numpy()[0, 0] == 0 < logits.grad.numpy()[0, 1]


def test_positive_weights():
    label_ids = [[0], [0, 1], [0], [0], []]
    found = train.positive_weights(label_ids, 3)
    np.testing.assert_allclose(found, [1.0, 2.0, 1.0])  # sqrt(4 / 1); label 2 has no sample


@pytest.mark.parametrize(
    "flags",
    [["--loss", "focal"], ["--loss", "asl"], ["--pos_weight", "auto"], ["--loss", "bce"]],
    ids=["focal", "asl", "pos_weight", "default"],
)
def test_flags_reach_the_training(small_data, tiny_model, tmp_path, flags):
    train.main(argv(small_data, tiny_model, tmp_path / "a", "--epochs", "1"))
    train.main(argv(small_data, tiny_model, tmp_path / "b", "--epochs", "1", *flags))
    assert same_weights(tmp_path / "a", tmp_path / "b") == (flags == ["--loss", "bce"])
    # The dev loss is the cross-entropy for all of them, so that runs can be compared.
    assert records(tmp_path / "b", "eval")[0]["loss"] < 1


SCORES = [  # dev figures of three epochs: each metric has another best one
    {"loss": 0.4, "micro_f1": 0.5, "macro_f1": 0.3},
    {"loss": 0.3, "micro_f1": 0.4, "macro_f1": 0.2},
    {"loss": 0.5, "micro_f1": 0.3, "macro_f1": 0.6},
]
KEPT = {"macro_f1": (3, "macro f1 score"), "micro_f1": (1, "micro f1 score"), "loss": (2, "loss")}


@pytest.mark.parametrize("name", KEPT)
def test_metric_for_best(small_data, tiny_model, tmp_path, monkeypatch, run_cli, name):
    """The model of the best epoch is kept, and the log names the metric."""
    results = iter(SCORES)
    monkeypatch.setattr(models, "evaluate", lambda *_: next(results))
    extra = ["--epochs", "3", "--metric_for_best", name]
    status, error = run_cli(train.main, argv(small_data, tiny_model, tmp_path / "a", *extra))
    epoch, shown = KEPT[name]
    assert status == 0 and f"Final best {shown}: {SCORES[epoch - 1][name]:.5f}" in error
    assert f"Save best {shown.removesuffix(' score')} text classification model in" in error
    # The same run cut off after that epoch ends with the same weights.
    extra = ["--epochs", str(epoch)]
    best = {"loss": 9.0, "micro_f1": 0.0, "macro_f1": 0.0}
    steps = iter([best] * (epoch - 1) + [SCORES[0]])
    monkeypatch.setattr(models, "evaluate", lambda *_: next(steps))
    train.main(argv(small_data, tiny_model, tmp_path / "b", *extra))
    assert same_weights(tmp_path / "a", tmp_path / "b") and weights(tmp_path / "a")


def gradients(model, scale, monkeypatch):
    """Of one batch with padding, after unscale."""
    monkeypatch.setattr(models, "LOSS_SCALE", scale)
    ids = np.arange(5, 69).reshape(4, 16)
    ids[1:, 5:] = 0  # [PAD]
    logits = model(paddle.to_tensor(ids), paddle.zeros(ids.shape, "int64"))
    targets = paddle.to_tensor(np.eye(4, 5, dtype=np.float32))
    models.scaled_backward(F.binary_cross_entropy_with_logits(logits, targets))
    models.unscale(model.parameters())
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


def test_the_loss_scale_leaves_the_gradients_as_they_are(tiny_model, monkeypatch):
    """A power of two is exact; only what was subnormal before is not rounded to it any more."""
    model = build_model(tiny_model, 5)
    model.eval()
    plain, scaled = (gradients(model, 2.0**power, monkeypatch) for power in (0, 20))
    assert plain.keys() == scaled.keys() and len(plain) > 20
    largest = max(np.abs(gradient).max() for gradient in plain.values())
    assert largest > 0
    for name, gradient in plain.items():
        np.testing.assert_allclose(scaled[name], gradient, rtol=1e-5, atol=1e-7 * largest)


def test_no_subnormal_numbers_in_the_backward_pass(tiny_model, monkeypatch):
    """Gradients of a well trained model are small; times masked weights they were subnormal."""
    model = build_model(tiny_model, 5)
    model.eval()
    tiny, softmax = np.finfo(np.float32).tiny, F.softmax
    seen = []

    def watched(x, *args, **kwargs):
        y = softmax(x, *args, **kwargs)
        y.register_hook(lambda gradient: seen.append((y.numpy(), gradient.numpy())))
        return y

    monkeypatch.setattr(F, "softmax", watched)
    counts = []
    for scale in (2.0**-10, 2.0**10):  # as with a loss 2**-10 times as large
        seen.clear()
        gradients(model, scale, monkeypatch)
        products = np.concatenate([np.abs(y * gradient).ravel() for y, gradient in seen])
        counts.append(int(((products > 0) & (products < tiny)).sum()))
    assert counts[0] > 0 == counts[1], counts
