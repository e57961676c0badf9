"""Does a transformer pay? Character TF-IDF with a linear classifier on any data folder, in seconds.

python benchmarks/baseline.py --dataset_dir data
"""

import json
import sys
import time
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metric  # noqa: E402
import utils  # noqa: E402


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    parser.add_argument("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    return parser.parse_args(argv)


def evaluate(train, dev, num_labels):
    """metric.MultiLabelCounts on dev of a classifier trained on train; both (texts, label_ids)."""
    (texts, ids), (dev_texts, dev_ids) = train, dev
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    model = OneVsRestClassifier(LinearSVC(C=1, random_state=0, dual="auto"))
    model.fit(vectorizer.fit_transform(texts), utils.multi_hot(ids, num_labels).astype(int))
    counts = metric.MultiLabelCounts(num_labels)
    decisions = model.predict(vectorizer.transform(dev_texts))
    counts.update(decisions, utils.multi_hot(dev_ids, num_labels))
    return counts


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    labels = utils.read_labels(data / "label.txt")
    train, dev = (utils.read_examples(data / f"{name}.txt", labels) for name in ("train", "dev"))
    start = time.perf_counter()
    counts = evaluate(train, dev, len(labels))
    result = {
        "system": "character 1-3-gram TF-IDF + LinearSVC(C=1), one-vs-rest",
        "micro_f1": round(100 * counts.micro_f1, 2),
        "macro_f1": round(100 * counts.macro_f1, 2),
        "subset_accuracy": round(100 * counts.report(labels)["subset_accuracy"], 2),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    utils.cli(main)
