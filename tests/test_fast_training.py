"""model.py's section on fast training: each formula against Paddle's own, threads, few rows."""

import json

import common
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import step_profile
from conftest import SAMPLE

import model as models
from model import build_model

NN = paddle.nn
PADDED = np.arange(5, 69).reshape(4, 16)
PADDED[1:, 5:] = 0  # [PAD]
TARGETS = np.eye(4, 5, dtype=np.float32)
SEED = np.random.SeedSequence(7)


def tensor(*shape, dtype="float64", seed=0):
    array = np.random.default_rng([seed, *shape]).normal(size=shape)
    return paddle.to_tensor(array, dtype=dtype, stop_gradient=False)


def gradients(function, inputs, seed=1):
    """Of sum(function(*inputs) * random numbers), one array for each input."""
    for x in inputs:
        x.clear_gradient()
    result = function(*inputs)
    weights = np.random.default_rng(seed).normal(size=result.shape)
    (result * paddle.to_tensor(weights, dtype=result.dtype)).sum().backward()
    return result.numpy(), [x.grad.numpy() for x in inputs]


def plain_attention(q, k, v, mask, keep):
    """The formula as Paddle's MultiHeadAttention has it."""
    probs = F.softmax(paddle.matmul(q, k, transpose_y=True) + mask.transpose([0, 1, 3, 2]))
    return paddle.matmul(probs if keep is None else probs * keep, v)


def cases(dtype):
    """{name: (fast function, plain function, inputs that have gradients)}"""

    def inputs(*shapes):
        return [tensor(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]

    heads = [(2, 3, 7, 4)] * 3
    mask = np.zeros((2, 3, 7, 1))
    mask[1, :, 4:] = -1e4
    mask, keep = (paddle.to_tensor(a, dtype=dtype) for a in (mask, np.ones((2, 3, 7, 7))))
    keep[:, :, ::2, 1] = 0
    keep = keep * 1.25

    def attention(function, factors):
        return lambda q, k, v: function(q, k, v, mask, factors)

    return {
        "linear": (models._Linear.apply, F.linear, inputs((2, 7, 5), (5, 3), (3,))),
        "layer_norm": (
            lambda x, weight, bias: models._LayerNorm.apply(x, weight, bias, 1e-5),
            lambda x, weight, bias: F.layer_norm(x, [5], weight, bias, 1e-5),
            inputs((2, 7, 5), (5,), (5,)),
        ),
        "attention": (
            attention(models._Attention.apply, None),
            attention(plain_attention, None),
            inputs(*heads),
        ),
        "attention with dropout": (
            attention(models._Attention.apply, keep),
            attention(plain_attention, keep),
            inputs(*heads),
        ),
    }


@pytest.mark.parametrize("name", cases("float32"))
def test_formulas_equal_paddles_own(name):
    fast, plain, inputs = cases("float32")[name]
    value, found = gradients(fast, inputs)
    expected_value, expected = gradients(plain, inputs)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", cases("float64"))
def test_gradients_are_those_of_finite_differences(name):
    fast, _, inputs = cases("float64")[name]
    _, found = gradients(fast, inputs)
    weights = np.random.default_rng(1)
    weights = paddle.to_tensor(weights.normal(size=fast(*inputs).shape))
    rng, step = np.random.default_rng(2), 1e-5
    for i, gradient in enumerate(found):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [x.detach() for x in inputs]
            moved[i] = moved[i] + paddle.to_tensor(sign * step * direction)
            ends.append(float((fast(*moved) * weights).sum()))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def loss_of(net, indices):
    """As train.py: the mean over all texts of the batch, backward; returns the logits."""
    ids = paddle.to_tensor(PADDED[indices])
    logits = net(ids, paddle.zeros_like(ids))
    loss = F.binary_cross_entropy_with_logits(logits, paddle.to_tensor(TARGETS[indices]))
    models.scaled_backward(loss * (len(indices) / len(PADDED)))
    return logits.numpy()


def gradients_of(net):
    models.unscale(net.parameters())
    found = {name: p.grad.numpy() for name, p in net.named_parameters() if p.grad is not None}
    net.clear_gradients()
    return found


def assert_close(found, expected):
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    assert found.keys() == expected.keys() and largest > 0
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * largest)


@pytest.fixture
def net(tiny_model):
    models.set_device("cpu")
    paddle.seed(3)
    net = build_model(tiny_model, 5)
    net.eval()
    return net


def test_a_whole_model_computes_the_same(net):
    """Logits and gradients of a padded batch, with the fast layers and without; Paddle's own are
    back afterwards."""
    before = NN.Linear.forward, NN.LayerNorm.forward, NN.MultiHeadAttention.forward, F.dropout
    expected_logits, expected = loss_of(net, np.arange(4)), gradients_of(net)
    with models.fast_layers():
        assert NN.Linear.forward is not before[0]
        logits, found = loss_of(net, np.arange(4)), gradients_of(net)
    after = NN.Linear.forward, NN.LayerNorm.forward, NN.MultiHeadAttention.forward, F.dropout
    assert after == before
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-6)
    assert_close(found, expected)


def test_dropout():
    """The right share is dropped, the rest scaled, backward alike."""
    x = paddle.ones([400, 500])
    x.stop_gradient = False
    models.seed_dropout(SEED)
    with models.fast_layers():
        y = F.dropout(x, 0.3)
        assert F.dropout(x, 0.3, training=False) is x and F.dropout(x, 0.0) is x
        assert float(F.dropout(x, 1.0).abs().sum()) == 0
    y.sum().backward()
    values = y.numpy()
    assert np.unique(values) == pytest.approx([0, 1 / 0.7], abs=1e-4)
    assert (values == 0).mean() == pytest.approx(0.3, abs=0.005)
    assert values.mean() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(x.grad.numpy(), values)


def test_no_dropout_but_this(net):
    """A model in training draws nothing from Paddle's generator: the seed decides alone."""
    net.train()
    ids = paddle.to_tensor(PADDED)

    def logits(seed, paddle_seed):
        paddle.seed(paddle_seed)
        models.seed_dropout(np.random.SeedSequence(seed))
        with models.fast_layers(), paddle.no_grad():
            return net(ids, paddle.zeros_like(ids)).numpy()

    np.testing.assert_array_equal(logits(1, 1), logits(1, 2))
    assert np.abs(logits(1, 1) - logits(2, 1)).max() > 1e-3


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(models, "num_threads", lambda: 2)
    monkeypatch.setattr(models, "MIN_SHARE", 2)
    yield
    monkeypatch.undo()
    models.set_device("cpu")


def train_on(replicas, seed):
    replicas.map(loss_of, np.arange(4), np.random.SeedSequence(seed))
    replicas.collect_gradients()
    return gradients_of(replicas.nets[0])


def test_shares_of_a_batch_add_up(net, two_cores):
    replicas = models.Replicas(net, 4)
    assert len(replicas.nets) == 2
    with models.fast_layers():
        loss_of(net, np.arange(4))
        expected = gradients_of(net)
        assert_close(train_on(replicas, 1), expected)


def test_a_share_may_be_missing(net, two_cores):
    """The last batch of an epoch can be a single text."""
    replicas = models.Replicas(net, 4)
    results = replicas.map(lambda net, indices: list(indices), np.arange(1), SEED)
    assert results == [[0]]
    loss_of(net, np.arange(1))
    replicas.collect_gradients()
    assert gradients_of(net)


@pytest.mark.parametrize("texts", [1, 3, 4])
def test_forward_of_the_copies(net, two_cores, texts):
    """The logits of a batch in its own order, in eval mode."""
    net.train()
    replicas = models.Replicas(net, 4)
    batch = {"input_ids": PADDED[:texts], "token_type_ids": np.zeros_like(PADDED[:texts])}
    found = replicas.forward(**batch)
    np.testing.assert_allclose(found, models.dygraph_forward(net)(**batch), rtol=1e-5, atol=1e-6)


def test_threads_leave_no_trace(net, two_cores, monkeypatch):
    """The same bits as one share after the other, also after many steps with dropout."""

    def run(steps):
        found = []
        net.set_state_dict(start)
        replicas = models.Replicas(net, 4)
        replicas.train()
        optimizer = models.make_optimizer(net, 1e-3, 0.0, 0.0)
        with models.fast_layers():
            for step in range(steps):
                replicas.map(loss_of, np.arange(4), np.random.SeedSequence(step))
                replicas.collect_gradients()
                models.unscale(net.parameters())
                optimizer.step()
                optimizer.clear_grad(set_to_zero=False)
                found.append(net.classifier.weight.numpy().tobytes())
        for own, shared in zip(*(net.parameters() for net in replicas.nets)):
            np.testing.assert_array_equal(own.numpy(), shared.numpy())
        return found

    start = {name: paddle.to_tensor(value.numpy()) for name, value in net.state_dict().items()}
    threads = run(40)
    assert len(set(threads)) == 40
    monkeypatch.setattr(models.ThreadPoolExecutor, "map", lambda _, *arguments: map(*arguments))
    assert run(40) == threads


def optimised(net, weight_decay, steps=3):
    """{name: array} after some steps."""
    optimizer = models.make_optimizer(net, 1e-2, weight_decay, 0.0)
    for _ in range(steps):
        loss_of(net, np.arange(4))
        models.unscale(net.parameters())
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    return {name: value.numpy() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rows_that_never_occur(tiny_model, net, weight_decay):
    """Training without them gives what training all rows gives: to the bit without decay."""
    paddle.seed(3)
    whole = build_model(tiny_model, 5)
    whole.eval()
    expected = optimised(whole, weight_decay)
    tables = models.EmbeddingRows(net, np.unique(PADDED), 16)
    small = net.base_model.embeddings
    occurring = len(np.unique(PADDED))
    assert small.word_embeddings.weight.shape[0] == occurring < len(tables.full["word_embeddings"])
    assert small.position_embeddings.weight.shape[0] == 16
    optimised(net, weight_decay)
    found = tables.weights((1 - 1e-2 * weight_decay) ** 3)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if weight_decay:
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-9)
        else:
            np.testing.assert_array_equal(found[name], value)


def test_profile_of_a_step(tiny_model, capsys):
    flags = {"dataset_dir": SAMPLE, "model_name": tiny_model, "steps": 2, "rows": 4}
    step_profile.main(common.argv(**flags))
    processor, *rows = capsys.readouterr().out.splitlines()
    rows = [json.loads(row) for row in rows]
    assert processor.startswith("Processor: ") and len(rows) == 5
    assert rows[0]["operator"] == "all" and rows[0]["wall_ms"] > 0
    assert {row["operator"] for row in rows[1:]} >= {"matmul dygraph", "addmm dygraph"}
    assert [row["ms"] for row in rows[1:]] == sorted([row["ms"] for row in rows[1:]], reverse=True)
