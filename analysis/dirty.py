"""Find training samples whose labels are probably wrong, for a person to look at.

    python dirty.py --dataset_dir ../data
    cat ../data/train_dirty_rest.txt ../data/train_dirty.txt > ../data/train_clean.txt

Three strategies. `tfidf` (default) and `finetune` compare the given labels with probabilities from
a model that did not see the sample (K-fold cross-validation; see `suspicion`). `tfidf` trains a
linear classifier on character n-grams in seconds, `finetune` runs train.py for each fold. `trustai`
is the original's: TrustAI's RepresenterPointModel on a checkpoint; it does not look at the labels.
"""

import contextlib
import shlex
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import metric  # noqa: E402
import utils  # noqa: E402
from utils import UserError, at_least, logger  # noqa: E402

model, compat = utils.LazyModule("model"), utils.LazyModule("trustai_compat")

STRATEGIES = ("tfidf", "finetune", "trustai")
SHRINKAGE = 3  # samples' worth of the mean of all labels


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data (all files are in dataset_dir)").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--dev_file", default="dev.txt", help="development set, read by --strategy finetune")
    add("--label_file", default="label.txt", help="label names, one per line")
    add("--dirty_file", default="train_dirty.txt", help="result: the suspicious samples")
    add("--rest_file", default="train_dirty_rest.txt", help="result: all others")
    add = parser.add_argument_group("selection").add_argument
    add("--strategy", choices=STRATEGIES, default="tfidf", help="how samples are ranked")
    add("--dirty_num", type=at_least(1), default=100, help="samples to find")
    add("--seed", type=at_least(0), default=3, help="seed of the folds")
    add = parser.add_argument_group("tfidf and finetune").add_argument
    add("--folds", type=at_least(2), default=5, help="folds of the cross-validation")
    add("--train_args", type=shlex.split, default="", help="flags for train.py, in quotation marks")
    add("--folds_dir", help="keep finetune's models; the same command continues a stopped run")
    add = parser.add_argument_group("trustai").add_argument
    add("--dirty_threshold", type=float, default=0.0, help="a class counts if its weight is above")
    utils.add_inference_flags(parser, "../checkpoint/")
    parser.set_defaults(batch_size=16)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    dirty_path, rest_path = data / args.dirty_file, data / args.rest_file
    scores_path = dirty_path.with_suffix(".scores.tsv")
    inputs = [data / name for name in (args.train_file, args.dev_file, args.label_file)]
    inputs += utils.model_files(args.params_path)
    utils.check_outputs([dirty_path, rest_path, scores_path], inputs)
    labels = utils.read_labels(data / args.label_file)
    texts, label_ids = utils.read_examples(data / args.train_file, labels)
    if args.dirty_num >= len(texts):
        raise UserError(
            f"--dirty_num {args.dirty_num}: {args.train_file} has only {len(texts)} samples"
        )
    if args.strategy == "trustai":
        scores, probs = representer_points(args, texts, labels), None
    else:
        if len(set(texts)) < args.folds:
            raise UserError(f"{args.train_file}: fewer different texts than --folds {args.folds}")
        fold_of = folds_of(texts, args.folds, args.seed)
        targets = utils.multi_hot(label_ids, len(labels))
        if args.strategy == "tfidf":
            probs = tfidf_probabilities(args, texts, targets, fold_of)
        else:
            probs = finetune_probabilities(args, texts, label_ids, fold_of, labels)
        scores = {"score": suspicion(probs, targets)}

    columns = {name: [f"{value:.6g}" for value in values] for name, values in scores.items()}
    columns["label"] = [",".join(labels[i] for i in ids) for ids in label_ids]
    if probs is not None:
        suggested = metric.label_names(metric.decode(probs), labels)
        columns["suggested_label"] = [",".join(names) for names in suggested]
    columns["text"] = list(map(utils.cell, texts))
    # The first score decides, the next ones break ties.
    ranking = np.lexsort([-score for score in reversed(scores.values())])
    rows = [columns, *([column[i] for column in columns.values()] for i in ranking)]
    lines = data_lines(texts, label_ids, labels)
    dirty, rest = np.sort(ranking[: args.dirty_num]), np.sort(ranking[args.dirty_num :])
    contents = {
        args.dirty_file: "".join(lines[i] for i in dirty),
        args.rest_file: "".join(lines[i] for i in rest),
        Path(args.dirty_file).with_suffix(".scores.tsv"): "".join(
            "\t".join(row) + "\n" for row in rows
        ),
    }
    utils.write_files(data, contents)
    message = "%d dirty samples saved in %s, the rest in %s"
    logger.info(message, len(dirty), dirty_path, rest_path)
    logger.info("Scores of all samples saved in %s, the most suspicious first", scores_path)


def data_lines(texts, label_ids, labels):
    rows = zip(map(utils.cell, texts), label_ids)
    return [f"{text}\t{','.join(labels[i] for i in ids)}\n" for text, ids in rows]


def suspicion(probs, targets):
    """How badly out-of-sample probabilities [texts, classes] go with the given labels: [texts].

    The cross-entropy of each label less its mean over the samples with the same value of it, summed
    over the labels. The mean keeps the samples of rare labels, which every model finds hard, from
    being suspects (the class-conditional thresholds of Northcutt et al. 2021, "Confident Learning:
    Estimating Uncertainty in Dataset Labels", have the same purpose). It is shrunk towards that of
    all labels, or the only sample of a label would be compared with itself.
    """
    given = np.where(targets > 0, probs, 1 - probs).astype(np.float64)
    loss = -np.log(np.clip(given, 1e-6, 1))
    for value in (0, 1):
        same = targets == value
        overall = loss[same].mean() if same.any() else 0.0
        sums, counts = np.where(same, loss, 0.0).sum(axis=0), same.sum(axis=0)
        means = (sums + SHRINKAGE * overall) / (counts + SHRINKAGE)
        loss -= np.where(same, means, 0.0)
    return loss.sum(axis=1)


def folds_of(texts, folds, seed):
    """The fold of each text; equal texts share one, or a model would have seen what it judges."""
    _, unique = np.unique(np.array(texts, dtype=object), return_inverse=True)
    rng = np.random.default_rng(seed)
    return (rng.permutation(unique.max() + 1) % folds)[unique]


def tfidf_probabilities(args, texts, targets, fold_of):
    """Out-of-sample probabilities [texts, classes]: TF-IDF of 1-3-grams, logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    logger.info("Strategy tfidf takes no model: --params_path and the like have no effect")
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    try:
        features = vectorizer.fit_transform(texts)
    except ValueError as error:  # no n-gram occurs twice
        raise UserError(f"{args.train_file}: too few or too short texts ({error})") from error
    probs = np.zeros(targets.shape, dtype=np.float32)
    for fold in tqdm(range(args.folds), "folds", leave=False, disable=None):
        inside = fold_of == fold
        for c, given in enumerate(targets.T.astype(bool)):
            if given[~inside].all() or not given[~inside].any():
                probs[inside, c] = given[~inside].mean()  # nothing to learn from
                continue
            classifier = LogisticRegression(C=10, solver="liblinear", random_state=args.seed)
            classifier.fit(features[~inside], given[~inside])
            probs[inside, c] = classifier.predict_proba(features[inside])[:, 1]
    return probs


def finetune_probabilities(args, texts, label_ids, fold_of, labels):
    """Out-of-sample probabilities [texts, classes] of the models that train.py makes per fold."""
    data, probs = Path(args.dataset_dir), np.zeros((len(texts), len(labels)), dtype=np.float32)
    inputs = [data / name for name in (args.train_file, args.dev_file, args.label_file)]
    lines = data_lines(texts, label_ids, labels)
    contents = {
        "dev.txt": "".join(data_lines(*utils.read_examples(data / args.dev_file, labels), labels)),
        "label.txt": "".join(f"{label}\n" for label in labels),
    }
    with contextlib.ExitStack() as stack:
        root = args.folds_dir or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(utils.run_lock("--folds_dir", root, "training"))
        root = Path(root).resolve()
        folders = [root / str(fold) for fold in range(args.folds)]
        for folder in filter(Path.is_dir, folders):
            utils.check_outputs([folder / "train.txt", *map(folder.joinpath, contents)], inputs)
        for fold, folder in enumerate(folders):
            logger.info("Fold %d of %d", fold + 1, args.folds)
            inside = np.flatnonzero(fold_of == fold)
            contents["train.txt"] = "".join(lines[i] for i in np.flatnonzero(fold_of != fold))
            utils.write_files(folder, contents)
            run_train(args, fold, folder)
            settings = {"batch_size": args.batch_size, "desc": "held out"}
            labeller = model.load_labeller(folder, args.device, **settings)
            _, probs[inside] = labeller.decide([texts[i] for i in inside])
    return probs


def run_train(args, fold, folder):
    """Runs train.py on the data in the folder. Raises UserError with its last words if it fails."""
    flags = ["--device", args.device, "--seed", args.seed]
    if args.max_seq_length:
        flags += ["--max_seq_length", args.max_seq_length]
    flags += [*args.train_args, "--dataset_dir", folder, "--save_dir", folder, "--resume"]
    command, last_lines = [sys.executable, ROOT / "train.py", *map(str, flags)], deque(maxlen=10)
    pipe = {"stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(command, **pipe) as process:
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                last_lines.append(line)
        except BaseException:  # Ctrl-C or SIGTERM
            process.terminate()
            raise
    if status := process.returncode:
        reason = " ".join("".join(last_lines).rpartition("error: ")[2].split())
        raise UserError(f"train.py on fold {fold + 1} in {folder}, exit status {status}: {reason}")


def representer_points(args, texts, labels):
    """Scores {"classes": [texts], "weight": [texts]}: classes of positive weight, their sum."""
    encoder = compat.Encoder(args.params_path, args.device, args.max_seq_length, args.batch_size)
    utils.check_labels(args.dataset_dir, args.label_file, encoder.info.labels)
    features = encoder.features(texts, "train")
    logger.info("Training the representer point model; on thousands of texts it takes minutes")
    weights = encoder.representer_points(features)
    positive = weights > args.dirty_threshold
    return {"classes": positive.sum(axis=1), "weight": np.where(positive, weights, 0).sum(axis=1)}


if __name__ == "__main__":
    utils.cli(main)
