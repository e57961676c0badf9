"""Find dev texts that the training set supports badly, and data that would support them.

    python sparse.py --device cpu --dataset_dir ../data --params_path ../checkpoint
    awk 1 ../data/train.txt ../data/support.txt > ../data/train_sparse_aug.txt

A dev text is sparse if even its most similar training texts are far from it (TrustAI's
FeatureSimilarityModel, cosine of the classifier's input). Support data are the training texts
nearest to the sparse ones, repeated or augmented, or with --annotate unlabelled texts to label.
"""

import itertools
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augmentation import STRATEGIES, add_augmentation_flags, make_augmenter, new_texts

import utils
from utils import UserError, at_least, logger

compat = utils.LazyModule("trustai_compat")


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data (all files are in dataset_dir)").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--dev_file", default="dev.txt", help="development set")
    add("--label_file", help="checked against the checkpoint; None: label.txt if it exists")
    add("--unlabeled_file", default="data.txt", help="candidates for --annotate, a text per line")
    add("--sparse_file", default="sparse.txt", help="result: the sparse dev texts")
    add("--support_file", default="support.txt", help="result: the support data")
    utils.add_inference_flags(parser, "../checkpoint/")
    parser.set_defaults(batch_size=16)
    add = parser.add_argument_group("selection").add_argument
    add("--annotate", action="store_true", help="take support data from --unlabeled_file")
    strategies = ["duplicate", *STRATEGIES]
    add("--aug_strategy", choices=strategies, default="substitute", help="what becomes of them")
    add("--sparse_num", type=at_least(1), default=100, help="sparse texts; 10-20 %% of dev")
    add("--support_num", type=at_least(1), default=100, help="support texts; 10-20 %% of train")
    add(
        "--rationale_num",
        "--rationale_num_sparse",
        type=at_least(1),
        default=3,
        help="nearest training texts whose mean similarity is a dev text's score",
    )
    add("--rationale_num_support", type=at_least(1), help="candidates per text; None: enough")
    add("--support_threshold", type=at_least(-1.0), default=0.7, help="similarity must be above")
    add("--seed", type=at_least(0), default=3, help="seed of the augmentation")
    add_augmentation_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    data = Path(args.dataset_dir)
    sparse_path, support_path = outputs = [data / args.sparse_file, data / args.support_file]
    outputs += [path.with_suffix(".scores.tsv") for path in outputs]
    files = (args.train_file, args.dev_file, args.unlabeled_file, args.label_file or "label.txt")
    inputs = [data / name for name in files]
    utils.check_outputs(outputs, [*inputs, *utils.model_files(args.params_path)])
    labels = utils.read_model_info(args.params_path).labels
    utils.check_labels(data, args.label_file, labels)
    train_texts, train_ids = utils.read_examples(data / args.train_file, labels)
    dev_texts, dev_ids = utils.read_examples(data / args.dev_file, labels)
    if args.sparse_num > len(dev_texts):
        raise UserError(
            f"--sparse_num {args.sparse_num}: {args.dev_file} has only {len(dev_texts)} samples; "
            "10-20 % of them are usual"
        )
    augmenter = None
    if not args.annotate and args.aug_strategy != "duplicate":
        augmenter = make_augmenter(args.aug_strategy, args.aug_percent, args.dict_dir)
        utils.check_outputs(outputs, augmenter.files)
    candidates = read_unlabeled(data / args.unlabeled_file) if args.annotate else train_texts

    encoder = compat.Encoder(args.params_path, args.device, args.max_seq_length, args.batch_size)
    nearest = compat.nearest
    dev_features = encoder.features(dev_texts, "dev")
    similarity = encoder.similarity(encoder.features(train_texts, "train"))
    means = nearest(similarity, dev_features, args.rationale_num, "sparse")[1].mean(axis=1)
    sparse = np.argsort(means, kind="stable")[: args.sparse_num]
    names = [[labels[j] for j in dev_ids[i]] for i in sparse]
    write_result(sparse_path, [dev_texts[i] for i in sparse], names, means[sparse])
    logger.info("Sparse data saved in %s", sparse_path)
    logger.info("Average score in sparse data: %.4f", means[sparse].mean())

    # A dev text in the training set would be an answer known beforehand.
    known = {*dev_texts, *(train_texts if args.annotate else ())}
    excluded = {i for i, text in enumerate(candidates) if text in known}
    if excluded:
        where = "train or dev" if args.annotate else "dev"
        logger.info("%d candidates are left out: their texts are in %s", len(excluded), where)
    first = {text: i for i, text in reversed(list(enumerate(candidates)))}
    excluded |= {i for i, text in enumerate(candidates) if first[text] != i}  # duplicates
    if args.annotate:
        similarity = encoder.similarity(encoder.features(candidates, "unlabeled"))
    # The nearest of one sparse text alone would do; some cannot be augmented.
    ranks = args.rationale_num_support or len(excluded) + 2 * args.support_num
    indices, scores = nearest(similarity, dev_features[sparse], ranks, "support")
    random.seed(args.seed)
    texts, names, support_scores, seen = [], [], [], {*train_texts, *dev_texts}
    for candidate, score in find_support(indices, scores, args.support_threshold, excluded):
        text = candidates[candidate]
        found = new_texts(text, itertools.repeat(augmenter), 1, seen) if augmenter else [text]
        texts += found
        support_scores += [score] * len(found)
        if not args.annotate:
            names += [[labels[j] for j in train_ids[candidate]]] * len(found)
        if len(texts) == args.support_num:
            break
    advice = "lower --support_threshold or give more candidates"
    if ranks < len(candidates):
        advice += " or raise --rationale_num_support"
    if not texts:
        raise UserError(f"no support data above the threshold, none written; {advice}")
    if len(texts) < args.support_num:
        logger.warning("Only %d support texts of %d; %s", len(texts), args.support_num, advice)
    write_result(support_path, texts, None if args.annotate else names, support_scores)
    logger.info("support data saved in %s", support_path)
    logger.info("support average scores: %.4f", np.mean(support_scores))


def find_support(indices, scores, threshold, excluded):
    """Yields (candidate, similarity): each sparse text's nearest in turn, then its second, ...

    indices, scores: [sparse texts, ranks]. A candidate comes once, if it is not in the set
    `excluded` and its similarity is above the threshold.
    """
    taken = set(excluded)
    for rank in range(indices.shape[1]):
        if not (scores[:, rank] > threshold).any():  # later ranks are less similar still
            break
        for candidate, score in zip(indices[:, rank].tolist(), scores[:, rank].tolist()):
            if score > threshold and candidate not in taken:
                taken.add(candidate)
                yield candidate, score


def read_unlabeled(path):
    """Texts of the file, each once, blank ones left out; of a line with a tab the part before it.

    predict.py's output can be read as well; its header line is skipped.
    """
    lines = list(utils.read_texts(path))
    texts = (line.split("\t")[0].strip() for line in lines[lines[0].startswith("text\tlabel") :])
    candidates = [text for text in dict.fromkeys(texts) if text]
    if not candidates:
        raise UserError(f"{path}: no texts; write one text per line")
    return candidates


def write_result(path, texts, names, scores):
    """The samples as a data file, and as `.scores.tsv` beside it; names None: texts alone."""
    lines = list(map(utils.cell, texts))
    if names is not None:
        lines = [f"{text}\t{','.join(given)}" for text, given in zip(lines, names)]
    header = "score\ttext" + "\tlabel" * (names is not None)
    rows = [header, *(f"{score:.6f}\t{line}" for score, line in zip(scores, lines))]
    files = {path.name: lines, path.with_suffix(".scores.tsv").name: rows}
    contents = {name: "".join(f"{line}\n" for line in files[name]) for name in files}
    utils.write_files(path.parent, contents)


if __name__ == "__main__":
    utils.cli(main)
