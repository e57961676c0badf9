"""Logits to labels, and how good the labels are.

The decision rule of the whole project lives here: a label is given when its probability is strictly
greater than its threshold, DEFAULT_THRESHOLD unless tuned; on request a text also gets a least and
a most number of labels. All figures come from running counts, so that memory does not grow with the
data and several processes can add theirs together.
"""

import numpy as np

DEFAULT_THRESHOLD = 0.5
BLOCK = 1 << 22  # probabilities that are put in order at a time


def probabilities(logits):
    """Sigmoid of the logits, float32, same shape; written with tanh so that nothing overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logits, dtype=np.float32)))


def decode(probs, thresholds=None, min_labels=0, max_labels=None):
    """Boolean decisions [batch, classes]: probability > threshold (scalar or [classes]).

    A row with fewer than `min_labels` then gets the labels nearest to passing until it has so many;
    of more than `max_labels` (None: any number) only the best stay. Labels are ordered by
    probability minus threshold; of equal ones the one that comes first is the better.
    """
    if thresholds is None:
        thresholds = DEFAULT_THRESHOLD
    probs, thresholds = np.asarray(probs), np.asarray(thresholds, dtype=np.float32)
    decisions = probs > thresholds
    if min_labels == 0 and max_labels is None:
        return decisions
    counts = decisions.sum(axis=1)
    wanted = np.clip(counts, min_labels, max_labels)
    for number in np.unique(wanted[wanted != counts]):  # one limit or both
        rows = np.flatnonzero((wanted == number) & (counts != number))
        for block in np.array_split(rows, 1 + rows.size * probs.shape[1] // BLOCK):
            # Float64 keeps apart what float32 would round to equal differences.
            decisions[block] = _best(probs[block].astype(np.float64) - thresholds, number)
    return decisions


def _best(margins, number):
    """Boolean [rows, classes]: the `number` greatest of each row, the first ones among equals."""
    if number == 0:
        return np.zeros(margins.shape, dtype=bool)
    last = -np.partition(-margins, number - 1, axis=1)[:, number - 1 : number]
    better, tied = margins > last, margins == last
    room = number - better.sum(axis=1, keepdims=True)
    return better | (tied & (np.cumsum(tied, axis=1) <= room))


def label_names(decisions, labels):
    """Names of the given labels, one list per row, in the order of `labels`."""
    return [[labels[i] for i in np.flatnonzero(row)] for row in decisions]


def bce_sum(logits, targets):
    """Sum of the binary cross-entropy over all elements, computed in float64."""
    x = np.asarray(logits, dtype=np.float64)
    return float(np.sum(np.maximum(x, 0.0) - x * targets + np.log1p(np.exp(-np.abs(x)))))


def _ratio(numerator, denominator):
    """Element-wise quotient, 0 where the denominator is 0 (scikit-learn's zero_division=0)."""
    numerator = np.asarray(numerator, dtype=np.float64)
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, np.zeros_like(numerator), where=denominator != 0)


def precision_recall_f1(tp, fp, fn):
    """Precision, recall and F1 from counts, element-wise; as scikit-learn defines them."""
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return precision, recall, _ratio(2.0 * precision * recall, precision + recall)


class MultiLabelCounts:
    """Running counts of true positives, false positives and false negatives per class.

    `update` takes 0/1 or boolean arrays [batch, classes]; time is linear in their size.
    """

    def __init__(self, num_labels):
        self.tp = np.zeros(num_labels, dtype=np.int64)
        self.fp = np.zeros(num_labels, dtype=np.int64)
        self.fn = np.zeros(num_labels, dtype=np.int64)
        self.exact = 0  # samples whose predicted set equals the gold set
        self.samples = 0

    def update(self, decisions, targets):
        predicted, gold = np.asarray(decisions, dtype=bool), np.asarray(targets, dtype=bool)
        self.tp += np.sum(predicted & gold, axis=0)
        self.fp += np.sum(predicted & ~gold, axis=0)
        self.fn += np.sum(~predicted & gold, axis=0)
        self.exact += int(np.sum(np.all(predicted == gold, axis=1)))
        self.samples += len(gold)

    def to_array(self):
        """All counts in one int64 array; arrays of several processes may be added."""
        return np.concatenate([self.tp, self.fp, self.fn, [self.exact, self.samples]])

    @classmethod
    def from_array(cls, array):
        counts = cls((len(array) - 2) // 3)
        counts.tp, counts.fp, counts.fn = np.split(np.asarray(array[:-2], dtype=np.int64), 3)
        counts.exact, counts.samples = int(array[-2]), int(array[-1])
        return counts

    @property
    def micro_f1(self):
        return float(precision_recall_f1(self.tp.sum(), self.fp.sum(), self.fn.sum())[2])

    @property
    def macro_f1(self):
        """Unweighted mean over all classes; one without gold and predicted samples counts as 0."""
        return float(np.mean(precision_recall_f1(self.tp, self.fp, self.fn)[2]))

    def report(self, labels):
        """All figures as plain fractions; classes in the order of `labels`."""
        precision, recall, f1 = precision_recall_f1(self.tp, self.fp, self.fn)
        micro = precision_recall_f1(self.tp.sum(), self.fp.sum(), self.fn.sum())
        keys = ("precision", "recall", "f1")
        return {
            "samples": self.samples,
            "subset_accuracy": self.exact / max(1, self.samples),
            "micro": dict(zip(keys, map(float, micro))),
            "macro": dict(zip(keys, (float(np.mean(v)) for v in (precision, recall, f1)))),
            "classes": [
                {
                    "label": label,
                    "support": int(self.tp[i] + self.fn[i]),
                    "predicted": int(self.tp[i] + self.fp[i]),
                    "precision": float(precision[i]),
                    "recall": float(recall[i]),
                    "f1": float(f1[i]),
                }
                for i, label in enumerate(labels)
            ],
        }


def best_threshold(probs, targets, gain=None):
    """The threshold that gives one class its best F1, and that F1.

    probs, targets: [samples]. Candidates are the midpoints between neighbouring distinct
    probabilities, so that scores close to a sample's do not flip it; of equally good ones the
    nearest to DEFAULT_THRESHOLD. A class without positive samples keeps DEFAULT_THRESHOLD.
    gain(tp, fp, fn), from arrays [candidates]: what is added to F1 in the choice, which then also
    has the candidate 1, never to give the class.
    """
    targets = np.asarray(targets, dtype=bool)
    if not targets.any():
        return DEFAULT_THRESHOLD, 0.0
    order = np.argsort(-probs, kind="stable")
    scores, tp = np.asarray(probs, dtype=np.float64)[order], np.cumsum(targets[order])
    predicted = np.arange(1, len(scores) + 1)
    f1 = 2.0 * tp / (predicted + targets.sum())
    value = f1 if gain is None else f1 + gain(tp, predicted - tp, targets.sum() - tp)
    following = np.append(scores[1:], 0.0)
    distinct = scores > following  # a cut between equal probabilities is none
    if not distinct.any():
        return DEFAULT_THRESHOLD, 0.0
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
    nearest = best[np.argmin(np.abs(candidates[best] - DEFAULT_THRESHOLD))]
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
    micro = _ratio(hits, totals)
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
