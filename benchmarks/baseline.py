"""Does a transformer pay? Character TF-IDF with a linear classifier on any data folder, in seconds.

python benchmarks/baseline.py --dataset_dir data
"""

import time

import common

import utils


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    parser.add_argument("--dataset_dir", required=True, help="folder with train, dev and label.txt")
    return parser.parse_args(argv)


def evaluate(dataset_dir, train_file="train.txt"):
    """metric.MultiLabelCounts on dev of a classifier trained on a file of the folder."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import LinearSVC

    labels, train, dev = common.read_data(dataset_dir, train_file, "dev.txt")
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    classifier = OneVsRestClassifier(LinearSVC(C=1, random_state=0, dual="auto"))
    targets = utils.multi_hot(train[1], len(labels)).astype(int)
    classifier.fit(vectorizer.fit_transform(train[0]), targets)
    return common.count(classifier.predict(vectorizer.transform(dev[0])), dev[1])


def main(argv=None):
    args = parse_args(argv)
    start = time.perf_counter()
    counts = evaluate(args.dataset_dir)
    common.print_row(
        system="character 1-3-gram TF-IDF + LinearSVC(C=1), one-vs-rest",
        **common.f1_percent(counts),
        subset_accuracy=100 * counts.exact / counts.samples,
        seconds=time.perf_counter() - start,
        processor=utils.processor(),
    )


if __name__ == "__main__":
    utils.cli(main)
