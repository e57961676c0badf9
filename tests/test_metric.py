"""metric.py against scikit-learn, a float64 reference and brute force."""

import functools
import math
import time
import warnings

import numpy as np
import pytest
import thresholds
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

import metric
from metric import MultiLabelCounts


def random_data(rng, samples, classes):
    """Targets and decisions; among many classes some have no gold, some no predicted samples."""
    targets = rng.random((samples, classes)) < rng.choice([0, 0.05, 0.3, 0.9], classes)
    wrong = rng.random((samples, classes)) < rng.choice([0, 0.02, 0.3], classes)
    return targets, (targets ^ wrong) & (rng.random(classes) > 0.1)


def counts_of(decisions, targets):
    counts = MultiLabelCounts(targets.shape[1])
    counts.update(decisions, targets)
    return counts


# -------------------------------------------------------------------------------------------- F1s
same = functools.partial(pytest.approx, rel=1e-14, abs=0)  # 1.7 gives 0.7499999999999999 for 0.75


@pytest.mark.parametrize("samples, classes", [(1, 1), (1, 5), (7, 20), (60, 13), (1611, 20)])
def test_equals_scikit_learn(samples, classes):
    rng = np.random.default_rng(samples)
    for _ in range(20 if samples > 1000 else 100):
        gold, predicted = random_data(rng, samples, classes)
        # scikit-learn takes one column for a binary problem, not for a multi-label one.
        kind = {"labels": [1], "zero_division": 0} if classes == 1 else {"zero_division": 0}
        y, z = (gold[:, 0], predicted[:, 0]) if classes == 1 else (gold, predicted)
        counts = counts_of(predicted, gold)
        report = counts.report([str(i) for i in range(classes)])
        for average in ("micro", "macro"):
            expected = precision_recall_fscore_support(y, z, average=average, **kind)[:3]
            keys = ("precision", "recall", "f1")
            assert report[average] == same(dict(zip(keys, expected))), average
            f1 = f1_score(y, z, average=average, **kind)
            assert getattr(counts, f"{average}_f1") == same(f1)
        assert report["subset_accuracy"] == accuracy_score(y, z)
        assert report["samples"] == samples
        rows = zip(*precision_recall_fscore_support(y, z, average=None, **kind))
        for figures, (precision, recall, f1, support) in zip(report["classes"], rows, strict=True):
            assert figures["precision"] == precision and figures["recall"] == recall
            assert figures["f1"] == same(f1) and figures["support"] == support
        assert [c["predicted"] for c in report["classes"]] == predicted.sum(0).tolist()
        assert [c["label"] for c in report["classes"]] == [str(i) for i in range(classes)]


def test_precision_recall_f1_by_hand():
    gold = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    predicted = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]])
    report = counts_of(predicted, gold).report(["a", "b", "c"])
    assert report["micro"] == {"precision": 3 / 5, "recall": 3 / 4, "f1": pytest.approx(2 / 3)}
    assert [c["f1"] for c in report["classes"]] == pytest.approx([4 / 5, 1 / 2, 0])
    assert report["macro"]["f1"] == pytest.approx(1.3 / 3)
    assert report["subset_accuracy"] == 1 / 4


def test_nothing_gold_and_nothing_predicted_gives_zeros_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = counts_of(np.zeros((4, 3)), np.zeros((4, 3))).report("abc")
        MultiLabelCounts(3).report("abc")  # before the first batch
    assert report["macro"] == report["micro"] == {"precision": 0, "recall": 0, "f1": 0}
    assert report["subset_accuracy"] == 1


def test_batches_and_processes_add_up():
    gold, predicted = random_data(np.random.default_rng(4), 101, 20)
    whole = counts_of(predicted, gold)
    chunked, arrays = MultiLabelCounts(20), []
    for start in range(0, 101, 8):
        part = predicted[start : start + 8].astype(np.float32), gold[start : start + 8].astype(int)
        chunked.update(*part)
        arrays.append(counts_of(*part).to_array())
    added = MultiLabelCounts.from_array(np.sum(arrays, axis=0))
    listed = MultiLabelCounts.from_array(whole.to_array().tolist())  # the training state is JSON
    for counts in (chunked, added, listed):
        assert counts.report(range(20)) == whole.report(range(20))
    added.update(predicted, gold)
    assert added.samples == 202 and added.micro_f1 == whole.micro_f1


# ------------------------------------------------------------------------------------- decisions
def test_probabilities():
    logits = np.array([-1e30, -500, -88, -20, -1, 0, 1, 20, 500, 3e38, -np.inf, np.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probs = metric.probabilities(logits.reshape(3, 4)).ravel()
    expected = [
        math.exp(x) / (1 + math.exp(x)) if x < 0 else 1 / (1 + math.exp(-x)) for x in logits
    ]
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-7)
    assert (np.diff(metric.probabilities(np.linspace(-30, 30, 9999))) >= 0).all()


def test_decisions_are_strictly_greater():
    above = np.nextafter(np.float32(0.5), np.float32(1))
    probs = np.array([[0.5, above, 0.49], [0.9, 0.3, 1.0]], dtype=np.float32)
    assert metric.decode(probs).tolist() == [[False, True, False], [True, False, True]]
    assert metric.decode(probs, 0.3).tolist() == [[True] * 3, [True, False, True]]
    decisions = metric.decode(probs, [0.9, 0.2, 0.48])
    assert decisions.tolist() == [[False, True, True], [False, True, True]]
    assert metric.label_names(decisions, ["a", "b", "c"]) == [["b", "c"], ["b", "c"]]
    assert metric.label_names(metric.decode(probs * 0), ["a", "b", "c"]) == [[], []]


def decided(probs, thresholds, least, most):
    """The rule of metric.decode, label by label in exact arithmetic."""
    rows = []
    for row in probs:
        margins = [float(p) - float(t) for p, t in zip(row, np.float32(thresholds), strict=True)]
        order = sorted(range(len(row)), key=lambda i: (-margins[i], i))
        number = max(least, sum(margin > 0 for margin in margins))
        number = number if most is None else min(number, most)
        rows.append([i in order[:number] for i in range(len(row))])
    return rows


@pytest.mark.parametrize("digits", [1, 8])  # with one digit most labels are equally near
def test_least_and_most_labels_against_brute_force(digits):
    rng = np.random.default_rng(10)
    for trial in range(150):
        classes = rng.integers(1, 9)
        probs = rng.random((20, classes)).round(digits).astype(np.float32)
        thresholds = np.full(classes, 0.5) if trial % 3 == 0 else rng.random(classes).round(digits)
        least = int(rng.integers(classes + 1))
        most = None if trial % 4 == 0 else int(rng.integers(least, classes + 1))
        found = metric.decode(probs, thresholds, least, most)
        assert found.dtype == bool and found.tolist() == decided(probs, thresholds, least, most)
        assert metric.decode(probs, thresholds, 0, classes).tolist() == (
            metric.decode(probs, thresholds).tolist()
        )


def test_least_and_most_labels_by_hand():
    # The second label is nearer to its threshold than the first, which is more probable.
    probs = np.array([[0.6, 0.2, 0.1], [0.95, 0.9, 0.9]], dtype=np.float32)
    thresholds = [0.9, 0.3, 0.9]
    assert metric.decode(probs, thresholds, 1).tolist() == [
        [False, True, False],
        [True, True, False],
    ]
    assert metric.decode(probs, thresholds, 0, 1).tolist() == [[False] * 3, [False, True, False]]
    assert metric.decode(probs, 0.5, 2, 2).tolist() == [[True, True, False]] * 2
    assert not metric.decode(probs, 0.5, 0, 0).any()
    # Probabilities whose differences from the threshold are equal in float32.
    tiny = np.array([[1e-9, 2e-9]], dtype=np.float32)
    assert metric.decode(tiny, 0.5, 1).tolist() == [[False, True]]


def test_least_and_most_labels_of_10_000(monkeypatch):
    probs = np.random.default_rng(11).random((40, 10_000)).astype(np.float32)
    start = time.perf_counter()
    decisions = metric.decode(probs, None, 1, 3)
    assert time.perf_counter() - start < 1
    assert (decisions.sum(axis=1) == 3).all()
    assert np.array_equal(np.where(decisions, probs, 0).max(axis=1), probs.max(axis=1))
    monkeypatch.setattr(metric, "BLOCK", 70_000)  # blocks of some rows
    assert np.array_equal(metric.decode(probs, None, 1, 3), decisions)


def test_loss_of_extreme_logits():
    rng = np.random.default_rng(5)
    logits = np.concatenate([rng.normal(0, 4, (50, 8)), [[-1e4, 1e4, -90, 90, 0, 0, 1e4, -1e4]]])
    targets = rng.integers(0, 2, logits.shape)
    expected = 0.0
    for x, t in zip(logits.ravel(), targets.ravel()):
        # -log sigmoid(x) = log(1 + exp(-x)); for a large -x that is -x itself
        x = x if t else -x
        expected += -x if x < -700 else math.log1p(math.exp(-x))
    assert metric.bce_sum(logits, targets) == pytest.approx(expected, rel=1e-12)
    # float32 sums of this size would be off by more than 1e-6 of the value.
    many = np.full((2000, 1000), 0.1, dtype=np.float32)
    one = math.log1p(math.exp(np.float32(0.1)))
    assert metric.bce_sum(many, np.zeros_like(many)) == pytest.approx(2e6 * one, rel=1e-9)


# ------------------------------------------------------------------------------------- thresholds
def f1_at(probs, targets, threshold):
    decisions = metric.decode(probs, threshold)
    return 2 * np.sum(decisions & targets) / max(1, decisions.sum() + targets.sum())


@pytest.mark.parametrize("digits", [1, 6])  # with one digit most probabilities are equal
def test_best_threshold_against_brute_force(digits):
    rng = np.random.default_rng(6)
    for _ in range(200):
        targets = rng.random(40) < rng.choice([0.05, 0.3, 0.8])
        targets[rng.integers(40)] = True
        probs = (0.7 * rng.random(40) + 0.3 * targets * rng.random(40)).round(digits)
        probs = probs.astype(np.float32)
        threshold, f1 = thresholds.best_threshold(probs, targets)
        cuts = np.concatenate([[0], np.unique(probs), np.arange(0, 1, 0.01)])
        assert f1 == pytest.approx(max(f1_at(probs, targets, cut) for cut in cuts), abs=1e-12)
        assert f1_at(probs, targets, threshold) == pytest.approx(f1, abs=1e-12)
        assert 0 <= threshold < 1


def test_best_threshold_keeps_clear_of_the_samples():
    targets = np.array([1, 1, 0, 0], dtype=bool)
    threshold, f1 = thresholds.best_threshold(np.array([0.9, 0.8, 0.2, 0.1]), targets)
    assert (threshold, f1) == (pytest.approx(0.5), 1.0)
    assert thresholds.best_threshold(np.array([0.9, 0.8]), np.zeros(2)) == (0.5, 0.0)
    # 0.85 (one right) and 0.05 (all of four, two right) give 2/3 each; 0.85 is nearer to 0.5.
    tied = thresholds.best_threshold(np.array([0.95, 0.75, 0.6, 0.1]), np.array([1, 0, 0, 1]))
    assert tied == (pytest.approx(0.85), pytest.approx(2 / 3))


def test_best_threshold_of_probabilities_that_are_all_zero():
    probs, targets = np.zeros(10, dtype=np.float32), np.arange(10) < 3
    threshold, _ = thresholds.best_threshold(probs, targets)
    assert 0 <= threshold <= 1


@pytest.mark.parametrize("probability", [1.0, 0.25])
def test_best_threshold_of_neighbouring_probabilities(probability):
    below = np.nextafter(np.float32(probability), np.float32(0))
    probs = np.array([probability, below, 0.2], dtype=np.float32)
    targets = np.array([True, False, False])
    threshold, f1 = thresholds.best_threshold(probs, targets)
    assert f1 == 1.0 and metric.decode(probs, threshold).tolist() == [True, False, False]


def test_probabilities_keep_their_precision_near_0():
    """Logits far below 0 are told apart, so that min_labels gives the greatest of them."""
    logits = np.array([[-20, -18.5, -17.6, -19], [-16, -15.9, -15.8, -90]], np.float32)
    probs = metric.probabilities(logits)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-logits.astype(float))), rtol=1e-6)
    decisions = metric.decode(probs, min_labels=1)
    assert decisions.argmax(axis=1).tolist() == [2, 2] and decisions.sum() == 2
    extremes = metric.probabilities(np.array([-200, -0.0, 0.0, 200]))
    assert extremes.tolist() == [0, 0.5, 0.5, 1]


def test_tuning_gains_nothing_from_noise():
    """In-sample tuning finds a gain in pure noise; the out-of-sample estimate must not."""
    rng = np.random.default_rng(8)
    gains, in_sample = [], []
    for seed in range(30):
        probs = rng.random((200, 4)).astype(np.float32)
        targets = rng.random((200, 4)) < 0.5
        tuned, held_out = thresholds.tune_thresholds(probs, targets, seed=seed)
        always = counts_of(np.ones_like(targets), targets).macro_f1  # the best rule for noise
        gains.append(held_out.macro_f1 - always)
        in_sample.append(counts_of(metric.decode(probs, tuned), targets).macro_f1 - always)
        assert held_out.samples == 200
    assert np.mean(in_sample) > 0.002  # else the test could not tell the two apart
    assert np.mean(gains) < 0


def test_tuning_finds_a_shifted_threshold():
    rng = np.random.default_rng(9)
    targets = rng.random((500, 3)) < 0.3
    probs = np.where(targets, 0.3, 0.1) + rng.normal(0, 0.03, targets.shape)
    probs[:, 2] = np.where(targets[:, 2], 0.9, 0.7)
    tuned, held_out = thresholds.tune_thresholds(probs.astype(np.float32), targets)
    assert tuned == pytest.approx([0.2, 0.2, 0.8], abs=0.05)
    assert held_out.macro_f1 > 0.99 > 0.5 > counts_of(metric.decode(probs), targets).macro_f1
    again = thresholds.tune_thresholds(probs.astype(np.float32), targets)
    assert again[0] == tuned and again[1].report("abc") == held_out.report("abc")


def test_tuning_counts_what_the_limits_leave():
    rng = np.random.default_rng(12)
    targets = rng.random((300, 4)) < 0.3
    probs = (0.5 * targets + 0.5 * rng.random(targets.shape)).astype(np.float32)
    plain, free = thresholds.tune_thresholds(probs, targets)
    tuned, held_out = thresholds.tune_thresholds(probs, targets, min_labels=1, max_labels=1)
    assert tuned == plain and (free.tp + free.fp).sum() != 300
    assert (held_out.tp + held_out.fp).sum() == held_out.samples == 300


def test_too_few_samples_to_tune():
    with pytest.raises(ValueError, match="4 samples are too few for 5 folds"):
        thresholds.tune_thresholds(np.full((4, 2), 0.5), np.ones((4, 2)))
    thresholds.tune_thresholds(np.full((5, 2), 0.5), np.ones((5, 2)))


def test_time_is_linear():
    """16 times the labels or rows may take 16 times as long, not 256 times."""

    def seconds(rows, classes):
        gold = np.arange(rows * classes).reshape(rows, classes) % 3 == 0
        best = math.inf
        for _ in range(3):  # the least is free of what else the machine does
            start = time.process_time()
            counts_of(~gold, gold).report(range(classes))
            best = min(best, time.process_time() - start)
        return best

    assert seconds(4, 160_000) < 60 * seconds(4, 10_000)
    assert seconds(160_000, 20) < 60 * seconds(10_000, 20)
    probs = np.random.default_rng(1).random((6, 10_000)).astype(np.float32)
    tuned, _ = thresholds.tune_thresholds(probs, probs > 0.4)
    assert len(tuned) == 10_000


def test_thresholds_for_both_averages():
    """A rare class whose best F1 takes many false labels gets fewer of them; micro F1 is higher."""
    rng = np.random.default_rng(0)
    targets = rng.random((2000, 12)) < [0.1] * 2 + [0.02] * 10
    noise = rng.normal(size=targets.shape) * ([0.5] * 2 + [1.5] * 10)
    probs = metric.probabilities(2 * targets - 2 + noise)
    figures = {}
    for target in ("macro_f1", "both"):
        tuned, _ = thresholds.tune_thresholds(probs, targets, target=target)
        counts = metric.MultiLabelCounts(12)
        counts.update(metric.decode(probs, tuned), targets)
        figures[target] = counts
    macro, both = figures["macro_f1"], figures["both"]
    assert both.micro_f1 > macro.micro_f1 + 0.01 and both.macro_f1 < macro.macro_f1
    assert both.micro_f1 + both.macro_f1 > macro.micro_f1 + macro.macro_f1
    assert both.fp[2:].sum() < macro.fp[2:].sum()


def test_a_hopeless_class_is_never_given_for_both_averages():
    """Its only positive has the lowest score: any cut that finds it lets everything in."""
    targets = np.zeros((100, 2), dtype=bool)
    targets[:50, 0], targets[99, 1] = True, True
    probs = np.stack([np.where(targets[:, 0], 0.9, 0.1), np.linspace(0.4, 0.2, 100)], axis=1)
    tuned, _ = thresholds.tune_thresholds(probs, targets, target="both")
    assert tuned[1] == 1 and metric.decode(probs, tuned).sum() == 50
    assert thresholds.tune_thresholds(probs, targets)[0][1] < 0.4


def test_one_class_is_tuned_alike_for_both_averages():
    rng = np.random.default_rng(0)
    targets = rng.random((300, 1)) < 0.2
    probs = metric.probabilities(2 * targets - 1 + rng.normal(size=targets.shape))
    chosen = [thresholds.tune_thresholds(probs, targets, target=t)[0] for t in ("macro_f1", "both")]
    assert chosen[0] == chosen[1]
