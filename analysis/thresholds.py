"""Choose one threshold per label; evaluate.py --tune_thresholds calls it.

The decision rule itself is metric.decode's.
"""

import numpy as np

import metric
from metric import MultiLabelCounts, decode


def best_threshold(probs, targets, gain=None):
    """The threshold that gives one class its best F1, and that F1.

    probs, targets: [samples]. Candidates are the midpoints between neighbouring distinct
    probabilities, so that scores close to a sample's do not flip it; of equally good ones the
    nearest to the default threshold, which a class without positive samples keeps.
    gain(tp, fp, fn), from arrays [candidates]: what is added to F1 in the choice, which then also
    has the candidate 1, never to give the class.
    """
    targets = np.asarray(targets, dtype=bool)
    if not targets.any():
        return metric.DEFAULT_THRESHOLD, 0.0
    order = np.argsort(-probs, kind="stable")
    scores, tp = np.asarray(probs, dtype=np.float64)[order], np.cumsum(targets[order])
    predicted = np.arange(1, len(scores) + 1)
    f1 = 2.0 * tp / (predicted + targets.sum())
    value = f1 if gain is None else f1 + gain(tp, predicted - tp, targets.sum() - tp)
    following = np.append(scores[1:], 0.0)
    distinct = scores > following  # a cut between equal probabilities is none
    if not distinct.any():
        return metric.DEFAULT_THRESHOLD, 0.0
    middle = (scores + following) / 2
    # `decode` compares in float32, where the middle of neighbouring numbers is one of them.
    middle = np.where(middle.astype(np.float32) < scores, middle, following)
    candidates, f1, value = middle[distinct], f1[distinct], value[distinct]
    if gain is not None:
        never = gain(0, 0, targets.sum())
        candidates, f1, value = (
            np.append(a, b) for a, b in ((candidates, 1), (f1, 0), (value, never))
        )
    best = np.flatnonzero(value == value.max())
    nearest = best[np.argmin(np.abs(candidates[best] - metric.DEFAULT_THRESHOLD))]
    return float(candidates[nearest]), float(f1[nearest])


def micro_f1_gain(f1, total, num_labels):
    """For best_threshold: what a class adds to micro F1, in units of its share of macro F1.

    Micro F1 is a quotient of sums over the classes, f1 = A / total with A = 2 tp and total =
    2 tp + fp + fn; a class raises it as far as it raises A - f1 * total (Dinkelbach 1967, "On
    nonlinear fractional programming").
    """
    scale = num_labels / max(1, total)
    return lambda tp, fp, fn: scale * (2 * tp - f1 * (2 * tp + fp + fn))


def _best_thresholds(probs, targets, rows, gains):
    """best_threshold of every class for each selection of rows, [len(rows), classes].

    Also returns micro_f1_gain of these thresholds for each selection.
    """
    chosen, num_labels = np.empty((len(rows), targets.shape[1])), targets.shape[1]
    hits, totals = np.zeros(len(rows)), np.zeros(len(rows))  # 2 tp, 2 tp + fp + fn
    for c in range(num_labels):  # one pass over the columns, scattered in memory
        scores, gold = np.ascontiguousarray(probs[:, c]), np.ascontiguousarray(targets[:, c])
        for i, (selected, gain) in enumerate(zip(rows, gains)):
            own_scores, own_gold = scores[selected], gold[selected]
            chosen[i, c] = best_threshold(own_scores, own_gold, gain)[0]
            given = decode(own_scores, chosen[i, c])
            hits[i] += 2 * np.sum(given & own_gold)
            totals[i] += given.sum() + own_gold.sum()
    micro = hits / np.maximum(totals, 1)
    return chosen, [micro_f1_gain(f1, total, num_labels) for f1, total in zip(micro, totals)]


def tune_thresholds(probs, targets, folds=5, seed=3, target="macro_f1", **limits):
    """One threshold per class on all data, and what such thresholds give on unseen data.

    probs, targets: [samples, classes]. Each fold is decided with thresholds chosen on the
    others, so the returned counts are an out-of-sample estimate (Yang 2001, "A study of
    thresholding strategies for text categorization", calls such thresholds SCut). target: macro_f1,
    each class its best F1, or both, which from there raises the sum of macro and micro F1 (one step
    of micro_f1_gain): a class then lets in fewer false labels for the sake of its own F1, and one
    that the model cannot tell apart gets threshold 1, which nothing exceeds. limits: the min_labels
    and max_labels of the held-out decisions; the choice is made per class, without them.
    Returns (thresholds [classes], MultiLabelCounts of the held-out decisions).
    Raises ValueError if there are fewer samples than folds.
    """
    targets = np.asarray(targets, dtype=bool)
    if len(targets) < folds:
        raise ValueError(f"{len(targets)} samples are too few for {folds} folds")
    fold_of = np.random.default_rng(seed).permutation(len(targets)) % folds
    rows = [fold_of != fold for fold in range(folds + 1)]  # no sample is in the last fold
    chosen, gains = _best_thresholds(probs, targets, rows, [None] * len(rows))
    if target == "both":
        chosen, _ = _best_thresholds(probs, targets, rows, gains)
    held_out = MultiLabelCounts(targets.shape[1])
    for fold in range(folds):
        inside = fold_of == fold
        held_out.update(decode(probs[inside], chosen[fold], **limits), targets[inside])
    return chosen[folds].tolist(), held_out
