"""Find training samples whose labels are probably wrong, for a person to look at.

    python dirty.py --dataset_dir ../data
    cat ../data/train_dirty_rest.txt ../data/train_dirty.txt > ../data/train_clean.txt

Three strategies. `tfidf` (default) and `finetune` compare the given labels with probabilities from
a model that did not see the sample (K-fold cross-validation; see `suspicion`). `tfidf` trains a
linear classifier on character n-grams in seconds, `finetune` runs train.py for each fold. `trustai`
is the original's: TrustAI's RepresenterPointModel on a checkpoint; it does not look at the labels.
"""

import zlib  # noqa: F401  libpaddle exports zlib symbols of its own; loaded after it, zlib crashes
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metric  # noqa: E402
import utils  # noqa: E402
from utils import UserError, at_least, logger  # noqa: E402

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
    more = "flags for train.py, such as '--model_name ernie-3.0-nano-zh --early_stop'"
    add("--train_args", default="", help=more)
    keep = "keep finetune's models there; the same command then continues a stopped run"
    add("--folds_dir", help=keep)
    add = parser.add_argument_group("trustai").add_argument
    least = "a class counts if its representer weight is above"
    add("--dirty_threshold", type=float, default=0.0, help=least)
    utils.add_inference_flags(parser, "../checkpoint/")
    parser.set_defaults(batch_size=16)
    args = parser.parse_args(argv)
    try:
        args.train_args = shlex.split(args.train_args)
    except ValueError as error:  # an open quotation mark
        raise UserError(f"--train_args: {error}") from error
    return args


def folds_of(texts, folds, seed):
    """The fold of each text; equal texts share one, or a model would have seen what it judges."""
    _, unique = np.unique(np.array(texts, dtype=object), return_inverse=True)
    rng = np.random.default_rng(seed)
    return (rng.permutation(unique.max() + 1) % folds)[unique]


def tfidf_probabilities(args, texts, targets, fold_of):
    """Out-of-sample probabilities [texts, classes]: TF-IDF of 1-3-grams, logistic regression."""
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
            model = LogisticRegression(C=10, solver="liblinear", random_state=args.seed)
            model.fit(features[~inside], given[~inside])
            probs[inside, c] = model.predict_proba(features[inside])[:, 1]
    return probs


def finetune_probabilities(args, texts, targets, fold_of, labels):
    """Out-of-sample probabilities [texts, classes] of the models that train.py makes per fold."""
    import train
    from predict import load_forward

    data, probs = Path(args.dataset_dir).resolve(), np.zeros(targets.shape, dtype=np.float32)
    names = metric.label_names(targets, labels)
    flags = ["--dataset_dir", data, "--dev_file", args.dev_file, "--label_file", args.label_file]
    flags += ["--device", args.device, "--seed", args.seed]
    if args.max_seq_length:
        flags += ["--max_seq_length", args.max_seq_length]
    flags += args.train_args
    with tempfile.TemporaryDirectory() as temporary:
        for fold in range(args.folds):
            logger.info("Fold %d of %d", fold + 1, args.folds)
            folder = Path(args.folds_dir or temporary).resolve() / str(fold)
            folder.mkdir(parents=True, exist_ok=True)
            inside = fold_of == fold
            with utils.atomic_file(folder / "train.txt") as file:
                rows = zip(
                    *((t, n) for t, n, held_out in zip(texts, names, inside) if not held_out)
                )
                utils.write_rows(file, *rows, labels, jsonl=False)
            own = ["--train_file", folder / "train.txt", "--save_dir", folder, "--resume"]
            try:
                train.main([str(flag) for flag in [*flags, *own]])
            except UserError as error:
                raise UserError(f"train.py on fold {fold + 1} in {folder}: {error}") from error
            forward, info = load_forward(folder, args.device)
            held_out = [text for text, held_out in zip(texts, inside) if held_out]
            encoded, _ = utils.encode(held_out, utils.load_tokenizer(folder), info.max_seq_length)
            logits = utils.logits_of(forward, encoded, args.batch_size, len(labels), "held out")
            probs[inside] = metric.probabilities(logits)
    return probs


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


def out_of_sample(args, texts, targets, labels):
    """Scores {"score": [texts]} and out-of-sample probabilities [texts, classes]."""
    if len(set(texts)) < args.folds:
        raise UserError(f"{args.train_file}: fewer different texts than --folds {args.folds}")
    fold_of = folds_of(texts, args.folds, args.seed)
    if args.strategy == "tfidf":
        logger.info("Strategy tfidf takes no model: --params_path and the like have no effect")
        probs = tfidf_probabilities(args, texts, targets, fold_of)
    else:
        probs = finetune_probabilities(args, texts, targets, fold_of, labels)
    return {"score": suspicion(probs, targets)}, probs


def representer_points(args, texts, labels):
    """Scores {"classes": [texts], "weight": [texts]}: classes of positive weight, their sum."""
    from trustai_compat import Encoder

    encoder = Encoder(args.params_path, args.device, args.max_seq_length, args.batch_size)
    utils.check_labels(args.dataset_dir, args.label_file, encoder.info.labels)
    features = encoder.features(texts, "train")
    logger.info("Training the representer point model; on thousands of texts it takes minutes")
    weights = encoder.representer_points(features)
    positive = weights > args.dirty_threshold
    return {"classes": positive.sum(axis=1), "weight": np.where(positive, weights, 0).sum(axis=1)}


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    labels = utils.read_labels(data / args.label_file)
    texts, label_ids = utils.read_examples(data / args.train_file, labels)
    dirty_path, rest_path = data / args.dirty_file, data / args.rest_file
    scores_path = dirty_path.with_suffix(".scores.tsv")
    inputs = (data / name for name in (args.train_file, args.dev_file, args.label_file))
    utils.check_outputs([dirty_path, rest_path, scores_path], inputs)
    if args.dirty_num >= len(texts):
        raise UserError(
            f"--dirty_num {args.dirty_num}: {args.train_file} has only {len(texts)} samples"
        )
    if args.strategy == "trustai":
        scores, probs = representer_points(args, texts, labels), None
    else:
        scores, probs = out_of_sample(args, texts, utils.multi_hot(label_ids, len(labels)), labels)
    # The first score decides, the next ones break ties.
    ranking = np.lexsort([-score for score in reversed(scores.values())])
    dirty = np.zeros(len(texts), dtype=bool)
    dirty[ranking[: args.dirty_num]] = True
    names = [[labels[i] for i in ids] for ids in label_ids]

    suggested = None if probs is None else metric.label_names(metric.decode(probs), labels)
    rows = [[*scores, "label", *(["suggested_label"] if suggested else []), "text"]]
    for i in ranking:
        row = [f"{score[i]:.6g}" for score in scores.values()] + [",".join(names[i])]
        rows.append([*row, *([",".join(suggested[i])] if suggested else []), texts[i]])
    contents = {Path(args.dirty_file).with_suffix(".scores.tsv"): rows}
    for name, chosen in ((args.dirty_file, dirty), (args.rest_file, ~dirty)):
        contents[name] = [(texts[i], ",".join(names[i])) for i in np.flatnonzero(chosen)]
    contents = {k: "".join("\t".join(row) + "\n" for row in v) for k, v in contents.items()}
    utils.write_files(data, contents)
    logger.info(
        "%d dirty samples saved in %s, the rest in %s", args.dirty_num, dirty_path, rest_path
    )
    logger.info("Scores of all samples saved in %s, the most suspicious first", scores_path)


if __name__ == "__main__":
    utils.cli(main)
