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
    """Sigmoid of the logits, float32, same shape.

    exp(-|x|) never overflows and keeps the relative precision of probabilities near 0, which decide
    when a text must get its `min_labels`. Above a logit of 17 float32 knows 1 only.
    """
    logits = np.asarray(logits, dtype=np.float32)
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, np.float32(1), small) / (1 + small)


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
    for limit in np.unique(wanted[wanted != counts]):  # min_labels, max_labels or both
        rows = np.flatnonzero((wanted == limit) & (counts != limit))
        for block in np.array_split(rows, 1 + rows.size * probs.shape[1] // BLOCK):
            # Float64 keeps apart what float32 would round to equal differences.
            decisions[block] = _best(probs[block].astype(np.float64) - thresholds, limit)
    return decisions


def _best(margins, k):
    """Boolean [rows, classes]: the k greatest of each row, the first ones among equals."""
    if k == 0:
        return np.zeros(margins.shape, dtype=bool)
    last = -np.partition(-margins, k - 1, axis=1)[:, k - 1 : k]
    better, tied = margins > last, margins == last
    room = k - better.sum(axis=1, keepdims=True)
    return better | (tied & (np.cumsum(tied, axis=1) <= room))


def label_names(decisions, labels):
    """Names of the given labels, one list per row, in the order of `labels`."""
    return [[labels[i] for i in np.flatnonzero(row)] for row in decisions]


def bce_sum(logits, targets):
    """Sum of the binary cross-entropy over all elements, computed in float64."""
    x = np.asarray(logits, dtype=np.float64)
    return float(np.sum(np.maximum(x, 0.0) - x * targets + np.log1p(np.exp(-np.abs(x)))))


def describe(result):
    """Dev figures ("loss", "micro_f1", "macro_f1") as the log shows them."""
    f1 = f"micro f1 score: {result['micro_f1']:.5f}, macro f1 score: {result['macro_f1']:.5f}"
    return f"eval loss: {result['loss']:.5f}, {f1}"


def score(result, name="macro_f1"):
    """How good dev figures are: the higher F1; while that is 0, the lower loss."""
    f1 = 0.0 if name == "loss" else result[name]
    return f1, 0.0 if f1 else -result["loss"]


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
