"""Evaluate a checkpoint per class, list what it gets wrong, tune thresholds; compare models.

python evaluate.py --device cpu --dataset_dir ../data --params_path ../checkpoint
python evaluate.py --device cpu --dataset_dir ../data --compare ../checkpoint ../export/float32:int8
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import thresholds

import metric
import utils
from utils import UserError, logger

model = utils.LazyModule("model")

FOLDS = 5  # of the cross-validation of thresholds
# Flags for one model, and those for several.
ALONE = "params_path bad_case_path tune_thresholds tune_for save_thresholds".split()
COMPARED = "changed_path resamples seed".split()
CELL_BYTES = 6  # per text and label of what is kept: a probability, a target, a fold's copy


def parse_args(argv=None):
    parser = utils.new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", required=True, help="folder of the files below")
    add("--train_file", default="train.txt", help="training set")
    add("--dev_file", default="dev.txt", help="development set")
    add("--label_file", help="checked against the checkpoint; None: label.txt if it exists")
    add("--skip_train", action="store_true", help="do not evaluate the training set")
    utils.add_inference_flags(parser, "../checkpoint/")
    utils.add_decision_flags(parser, "the checkpoint's")
    add = parser.add_argument_group("output").add_argument
    add("--bad_case_path", default="./bad_case.txt", help="dev texts that are labelled wrongly")
    add("--json_path", help="write all figures there as JSON")
    add(
        "--report_path",
        help="write an HTML page there: tables, curves, thresholds, confused labels, worst texts",
    )
    add("--tune_thresholds", action="store_true", help="choose one threshold per label on dev")
    add(
        "--tune_for",
        choices=["macro_f1", "both"],
        default="macro_f1",
        help="what tuning raises; both: macro and micro F1 together",
    )
    add("--save_thresholds", action="store_true", help="store the tuned ones in the checkpoint")
    add = parser.add_argument_group("comparison of models").add_argument
    add(
        "--compare",
        nargs="+",
        metavar="MODEL",
        help="compare others with the first: checkpoints, or bundles as export/float32[:int8]",
    )
    add("--changed_path", default="./changed.txt", help="dev texts that they label differently")
    add("--resamples", type=utils.at_least(1), default=1000, help="of the bootstrap intervals")
    add("--seed", type=utils.at_least(0), default=3, help="seed of the resamples")
    args = parser.parse_args(argv)
    for name in ALONE if args.compare else COMPARED:
        if getattr(args, name) != parser.get_default(name):
            if args.compare:
                raise UserError(f"--compare takes no --{name}; leave it out")
            raise UserError(f"--{name} needs --compare")
    if args.save_thresholds and not args.tune_thresholds:
        raise UserError("--save_thresholds needs --tune_thresholds")
    if args.tune_for != "macro_f1" and not args.tune_thresholds:
        raise UserError("--tune_for needs --tune_thresholds")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        import compare  # scikit-learn takes a second to import

        compare.run(args)
        return
    data = Path(args.dataset_dir)
    info = utils.read_model_info(args.params_path)
    limits = {"min_labels": args.min_labels, "max_labels": args.max_labels}
    info = info.with_settings(args.max_seq_length, **limits)
    utils.check_labels(data, args.label_file, info.labels)
    files = {"train": args.train_file, "dev": args.dev_file}
    if args.skip_train:
        del files["train"]
    examples = {k: utils.read_examples(data / v, info.labels) for k, v in files.items()}
    if args.tune_thresholds and len(examples["dev"][0]) < FOLDS:
        raise UserError(f"--tune_thresholds needs at least {FOLDS} samples in {args.dev_file}")
    outputs = [path for path in (args.bad_case_path, args.json_path, args.report_path) if path]
    inputs = [data / (f or "label.txt") for f in (args.train_file, args.dev_file, args.label_file)]
    utils.check_outputs(outputs, inputs + utils.model_files(args.params_path))
    kept = None
    if args.tune_thresholds or args.report_path:
        kept = new_kept(len(examples["dev"][0]), len(info.labels))
    settings = {"batch_size": args.batch_size, "long_text": args.long_text}
    labeller = model.load_labeller(args.params_path, args.device, info, **settings)
    if info.thresholds is not None:
        logger.warning("The thresholds are tuned: figures on the set they come from are optimistic")

    reports = {}
    if "train" in examples:
        labeller.desc = "train"
        reports["train"] = report_of(labeller, *examples["train"])
    labeller.desc = "dev"
    with utils.atomic_file(args.bad_case_path) as file:
        file.write("Prediction\tLabel\tText\n")
        reports["dev"] = report_of(labeller, *examples["dev"], file, kept)
    log_report(reports["dev"], reports.get("train"))
    logger.info("Bad case in dev dataset saved in %s", args.bad_case_path)
    if args.tune_thresholds:
        reports["tuned"] = tune(args, kept, info)
    if args.json_path:
        utils.write_json(args.json_path, reports)
        logger.info("Report saved in %s", args.json_path)
    if args.report_path:
        write_page(args, info, reports, *examples["dev"], kept)
        logger.info("Page saved in %s; open it in a browser", args.report_path)


def report_of(labeller, texts, label_ids, file=None, kept=None):
    """Figures of one set, a chunk of texts at a time; see metric.MultiLabelCounts.report.

    `file` gets the texts that are labelled wrongly, `kept` (see new_kept) the rest.
    """
    labels, start = labeller.info.labels, 0
    counts = metric.MultiLabelCounts(len(labels))
    for chunk, decisions, probs in labeller.stream(texts):
        rows = slice(start, start + len(chunk))
        start += len(chunk)
        targets = utils.multi_hot(label_ids[rows], len(labels))
        counts.update(decisions, targets)
        if file is None:
            continue
        predicted = [np.flatnonzero(row).astype(np.int32) for row in decisions]
        write_bad_cases(file, chunk, label_ids[rows], predicted, labels)
        if kept:
            kept.probs[rows], kept.targets[rows] = probs, targets
            kept.predicted += predicted
            kept.untuned.update(metric.decode(probs, **labeller.info.limits), targets)
    labeller.log_truncation()
    return counts.report(labels)


def new_kept(num_texts, num_labels):
    """What --tune_thresholds and --report_path need of the dev set: all its probabilities.

    Raises UserError if they would take more than half of the memory.
    """
    needed, memory = CELL_BYTES * num_texts * num_labels, memory_bytes()
    if needed > memory / 2:
        raise UserError(
            f"--tune_thresholds and --report_path take {CELL_BYTES} bytes x {num_texts} texts x "
            f"{num_labels} labels = {needed / 1e9:.1f} GB, more than half of this machine's "
            f"{memory / 1e9:.1f} GB; give a smaller --dev_file"
        )
    return SimpleNamespace(
        probs=np.empty((num_texts, num_labels), dtype=np.float32),
        targets=np.empty((num_texts, num_labels), dtype=bool),
        predicted=[],  # class ids of each text
        untuned=metric.MultiLabelCounts(num_labels),  # by the default threshold
    )


def memory_bytes():
    """Memory that this process may use: the machine's, or its container's (cgroup v2, v1)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        limit = file.read_text().strip() if file.exists() else "max"
        if limit != "max":
            limits.append(int(limit))
    return min(limits)


def percent(figures):
    precision, recall, f1 = (100 * figures[key] for key in ("precision", "recall", "f1"))
    return f"precision: {precision:.2f} | recall: {recall:.2f} | F1 score {f1:.2f}"


def log_report(dev, train):
    """The report as log lines; `train` may be None."""
    logger.info("-----Evaluate model-------")
    if train:
        logger.info("Train dataset size: %d", train["samples"])
    logger.info("Dev dataset size: %d", dev["samples"])
    logger.info("Accuracy in dev dataset: %.2f%%", 100 * dev["subset_accuracy"])
    for name in ("micro", "macro"):
        logger.info("%s avg in dev dataset: %s", name.capitalize(), percent(dev[name]))
    reports = [("train", train), ("dev", dev)] if train else [("dev", dev)]
    for i, figures in enumerate(dev["classes"]):
        logger.info("Class name: %s", figures["label"])
        for name, report in reports:
            row, total = report["classes"][i], report["samples"]
            share = f"{row['support']}({100 * row['support'] / total:.1f}%)"
            message = "Evaluation examples in %s dataset: %s | %s"
            logger.info(message, name, share, percent(row))
        logger.info("----------------------------")


def write_bad_cases(file, texts, label_ids, predicted, labels):
    """label_ids, predicted: class ids per text."""
    for text, given, gold in zip(texts, predicted, label_ids):
        if set(given) != set(gold):
            names = (",".join(labels[i] for i in ids) for ids in (given, gold))
            file.write("\t".join([*names, utils.cell(text)]) + "\n")


def write_page(args, info, reports, texts, label_ids, kept):
    """The HTML page of the dev set."""
    import report  # scikit-learn takes a second to import

    about = [
        (("数据集", "Set"), str(Path(args.dataset_dir) / args.dev_file)),
        (("模型", "Checkpoint"), args.params_path),
        (("判定规则", "Decision rule"), report.decision_rule(info)),
        (("文本数", "Texts"), len(texts)),
        (("标签数", "Labels"), len(info.labels)),
    ]
    if "tuned" in reports:
        reports = {**reports, "out_of_sample": reports["tuned"]["out_of_sample"]}
    used = info.thresholds or [metric.DEFAULT_THRESHOLD] * kept.probs.shape[1]
    page = report.render(about, reports, texts, label_ids, kept.predicted, kept.probs, used)
    with utils.atomic_file(args.report_path) as file:
        file.write(utils.printable(page))


def save_thresholds(params_path, tuned):
    path = Path(params_path) / utils.CONFIG_FILE
    utils.write_json(path, {**utils.read_json(path), "thresholds": tuned})


def tune(args, kept, info):
    """Logs what tuned thresholds give on held-out folds; stores them in the checkpoint if asked."""
    labels, limits = info.labels, info.limits
    tuned, held_out = thresholds.tune_thresholds(
        kept.probs, kept.targets, FOLDS, target=args.tune_for, **limits
    )
    before, after = kept.untuned.report(labels), held_out.report(labels)
    micro, macro = (
        f"{average} F1 {100 * before[average]['f1']:.2f} -> {100 * after[average]['f1']:.2f}"
        for average in ("micro", "macro")
    )
    message = "Tuned thresholds, out of sample (%d-fold cross-validation on dev): %s | %s"
    logger.info(message, FOLDS, micro, macro)
    for label, threshold in zip(labels, tuned):
        logger.info("Threshold of %s: %.3f", label, threshold)
    if args.save_thresholds:
        save_thresholds(args.params_path, tuned)
        logger.info("Thresholds stored in %s/%s", args.params_path, utils.CONFIG_FILE)
    else:
        logger.info("Add --save_thresholds to store them in the checkpoint")
    return {"thresholds": dict(zip(labels, tuned)), "out_of_sample": after}


if __name__ == "__main__":
    utils.cli(main)
