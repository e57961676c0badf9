"""In what the decisions of several models differ, with bootstrap intervals; compare.py calls it.

Decisions and gold labels are 0/1 CSR matrices [texts, classes] of integers, the classes in the same
order; `given` holds the decisions of each model, those of the first being what the others are
compared with. Nothing here loops over texts.
"""

import numpy as np
from scipy import sparse

import metric

LEVEL = 95  # percent: how often an interval holds the true figure, over many dev sets
CELLS = 1 << 22  # of resampled texts or label counts that are held at a time


def counts_of(gold, given):
    """metric.MultiLabelCounts of decisions; both 0/1 CSR [texts, classes]."""
    right = gold.multiply(given)
    tp, predicted, support = (np.ravel(m.sum(axis=0)) for m in (right, given, gold))
    exact = np.ravel(abs(gold - given).sum(axis=1)) == 0
    rest = [int(exact.sum()), gold.shape[0]]
    return metric.MultiLabelCounts.from_array(
        np.concatenate([tp, predicted - tp, support - tp, rest])
    )


def resamples(num_texts, number, seed, block):
    """Yields how often each text is drawn, int64 [up to `block`, num_texts]; `number` rows in all.

    A row is one resample: num_texts texts drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, number, block):
        rows = min(block, number - start)
        drawn = rng.integers(num_texts, size=(rows, num_texts))
        drawn += num_texts * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)


def bootstrap(gold, given, number=1000, seed=3):
    """Micro and macro F1 of every model on resampled dev sets, float64 [2, models, number].

    gold, given (of each model): 0/1 CSR [texts, classes]. All models are counted on the same drawn
    texts, so that differences along the second axis are paired: the paired bootstrap of Koehn
    (2004), "Statistical Significance Tests for Machine Translation Evaluation", section 3, with the
    percentile intervals of Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter
    13. F1 is metric.py's, where a label that is neither drawn nor given counts as 0: with very rare
    labels the interval of macro F1 lies low; that of a difference hardly changes.
    """
    parts = [gold, *given, *(gold.multiply(one) for one in given)]
    by_text = sparse.hstack(parts, "csr").T.tocsr()  # so that a product is [labels, resamples]
    block, found = max(1, CELLS // max(by_text.shape)), []
    for drawn in resamples(gold.shape[0], number, seed, block):
        sums = (by_text @ drawn.T).reshape(len(parts), gold.shape[1], len(drawn))
        support, predicted, tp = sums[:1], sums[1 : 1 + len(given)], sums[1 + len(given) :]
        counts = tp, predicted - tp, support - tp
        micro = metric.precision_recall_f1(*(count.sum(axis=1) for count in counts))[2]
        macro = metric.precision_recall_f1(*counts)[2].mean(axis=1)
        found.append([micro, macro])
    return np.concatenate(found, axis=2)


def interval(values):
    """[low, high]: the middle LEVEL percent of resampled figures."""
    return np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2]).tolist()


def verdict(change, low, high):
    """What the interval of a difference says. change: CSR of the changed decisions."""
    if change.count_nonzero() == 0:
        return "same"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def figures(labels, gold, given, number=1000, seed=3):
    """What changed, as plain data: {"models": [...], "classes": [...]}.

    gold, given (of each model): 0/1 CSR [texts, classes]. Of each model metric.py's report, the
    intervals of both F1 and, of all but the first, the differences to it. Of each label F1 per
    model and, per model, the texts that gained and lost it against the first model and how many of
    these changes are right; labels of the largest change of F1 come first.
    """
    reports = [counts_of(gold, one).report(labels) for one in given]
    samples = dict(zip(("micro", "macro"), bootstrap(gold, given, number, seed)))
    wrong = [np.ravel(abs(one - gold).sum(axis=1)) for one in given]
    models, changes = [], []
    for i, one in enumerate(given):
        found = {key: value for key, value in reports[i].items() if key != "classes"}
        for average, values in samples.items():
            found[average]["f1_interval"] = interval(values[i])
        change = one - given[0]
        gained, lost = (change > 0).astype(np.int32), (change < 0).astype(np.int32)
        right = gained.multiply(gold).sum(axis=0) + (lost - lost.multiply(gold)).sum(axis=0)
        changes.append([np.ravel(m).tolist() for m in (gained.sum(0), lost.sum(0), right)])
        if i:
            found["difference"] = {
                average: {
                    "f1": reports[i][average]["f1"] - reports[0][average]["f1"],
                    "f1_interval": (bounds := interval(values[i] - values[0])),
                    "verdict": verdict(change, *bounds),
                }
                for average, values in samples.items()
            }
            found["texts"] = {
                "changed": int(np.count_nonzero(np.ravel(abs(change).sum(axis=1)))),
                "better": int((wrong[i] < wrong[0]).sum()),
                "worse": int((wrong[i] > wrong[0]).sum()),
            }
        models.append(found)
    classes = [
        {
            "label": label,
            "support": reports[0]["classes"][i]["support"],
            "f1": [r["classes"][i]["f1"] for r in reports],
            **{
                key: [change[k][i] for change in changes]
                for k, key in enumerate(("gained", "lost", "right"))
            },
        }
        for i, label in enumerate(labels)
    ]
    return {"models": models, "classes": sorted(classes, key=size_of_change)}


def size_of_change(row):
    """Key that sorts labels: the largest change of F1 first, then the most changed texts."""
    return -max(abs(f1 - row["f1"][0]) for f1 in row["f1"]), -sum(row["gained"] + row["lost"])


def changed_texts(gold, given):
    """Indices of the texts on which models differ; what has become worst comes first."""
    changed = sum(np.ravel(abs(one - given[0]).sum(axis=1)) for one in given)
    wrong = [np.ravel(abs(one - gold).sum(axis=1)) for one in given]
    worse = np.max([one - wrong[0] for one in wrong[1:]], axis=0)
    rows = np.flatnonzero(changed)
    return rows[np.lexsort([-changed[rows], -worse[rows]])].tolist()
