"""Several models on one dev set; evaluate.py --compare calls it.

A model is a checkpoint folder, which runs on Paddle, or the prefix of a bundle, which runs on ONNX
Runtime: export/float32, or export/float32:int8 for another precision. Each model decides by its own
tokenizer, length and thresholds. The first one is what the others are compared with.
"""

import shutil
import string
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy" / "predictor"))
import differences
import report

import utils
from utils import UserError, logger

model = utils.LazyModule("model")
predictor = utils.LazyModule("predictor")

PARTS = 6  # of the texts, on which the models take turns
TIMED = 3000  # texts that are enough to measure the speed
SHOWN = 20  # changed labels in the log
VERDICTS = {
    "same": ("标签完全相同", "the same labels"),
    "worse": ("更差", "worse"),
    "unclear": ("分不出高下", "no clear difference"),
    "better": ("更好", "better"),
}
SECTIONS = {
    "answer": ("结论", "Answer"),
    "models": ("模型", "Models"),
    "labels": ("标签的变化", "Labels"),
    "texts": ("文本的变化", "Texts with other labels"),
}


# ------------------------------------------------------------------------------------------ models
@dataclass(frozen=True)
class Model:
    """One of the compared models. name: the letter that stands for it. precision: of the ONNX file;
    None: a checkpoint."""

    name: str
    spec: str  # as the command names it
    path: str  # of the folder, or the bundle's prefix
    precision: str | None
    info: utils.ModelInfo

    @property
    def engine(self):
        return "Paddle" if self.precision is None else f"ONNX Runtime {self.precision}"

    @property
    def folder(self):
        return Path(self.path) if self.precision is None else Path(self.path).parent

    def files(self):
        """What is loaded, as far as it exists."""
        weights = utils.ONNX_FILES.get(self.precision, utils.WEIGHTS_FILE)
        names = utils.CONFIG_FILE, weights, "vocab.txt", "tokenizer_config.json"
        return [self.folder / name for name in names if (self.folder / name).exists()]

    def load(self, args):
        """Its utils.Labeller; makes the bundle's ONNX file if it is missing."""
        settings = {"batch_size": args.batch_size, "long_text": args.long_text}
        if self.precision is None:
            return model.load_labeller(self.path, args.device, self.info, **settings)
        device, _, number = args.device.partition(":")
        limits = {"max_seq_length": args.max_seq_length, **limits_of(args)}
        return predictor.Predictor(
            self.path, device, self.precision, int(number or 0), **settings, **limits
        )


def limits_of(args):
    return {"min_labels": args.min_labels, "max_labels": args.max_labels}


def split_spec(spec, device):
    """(path, precision) of a model that --compare names; raises UserError if it cannot be run."""
    path, _, precision = spec.rpartition(":")
    if not path or precision not in utils.ONNX_FILES:
        path, precision = spec, None
    where, folder = f"--compare {spec}", Path(path)
    if folder.is_dir():
        graphs = [*folder.glob("*.onnx"), *folder.glob("*.pdiparams")]
        if (folder / utils.WEIGHTS_FILE).exists() or not graphs:
            if precision:
                raise UserError(
                    f"{where}: a checkpoint has no precision; run export_model.py on it, and give "
                    f"the bundle's prefix, such as export/float32:{precision}"
                )
            return path, None
        raise UserError(f"{where}: a bundle's folder; give the prefix of its files, {path}/float32")
    graphs = [file.with_suffix("") for file in sorted(folder.parent.glob("*.pdiparams"))]
    if graphs and folder not in graphs:
        raise UserError(f"{where}: no such bundle; there is {', '.join(map(str, graphs))}")
    if not (folder.parent / utils.CONFIG_FILE).exists():
        raise UserError(f"{where}: neither a checkpoint folder nor a bundle's prefix is there")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "gpu") or not (number or "0").isdigit():
        raise UserError(f"{where}: a bundle runs on cpu, gpu or gpu:0, not on --device {device}")
    if precision == "int8" and kind != "cpu":
        raise UserError(f"{where}: int8 needs --device cpu; on the GPU use fp16")
    if precision == "fp16" and kind != "gpu":
        raise UserError(f"{where}: fp16 needs --device gpu; on the CPU use int8")
    return path, precision or "fp32"


def read_models(args):
    """The models of --compare. Raises UserError if there is one model, or their labels differ."""
    if not 2 <= len(args.compare) <= len(string.ascii_uppercase):
        raise UserError(f"--compare takes 2 to 26 models, not {len(args.compare)}")
    models = []
    for name, spec in zip(string.ascii_uppercase, args.compare):
        path, precision = split_spec(spec, args.device)
        info = utils.read_model_info(path if precision is None else Path(path).parent)
        info = info.with_settings(args.max_seq_length, **limits_of(args))
        models.append(Model(name, spec, path, precision, info))
    labels, first = models[0].info.labels, args.compare[0]
    for other in models[1:]:
        check_same_names(f"--compare {other.spec}", other.info.labels, labels, first)
    label_file = Path(args.dataset_dir) / (args.label_file or "label.txt")
    if args.label_file or label_file.exists():
        check_same_names(label_file, utils.read_labels(label_file), labels, first)
    return models


def check_same_names(where, names, labels, first):
    """Raises UserError unless both are the same label names, in whatever order."""
    known, found = set(labels), set(names)
    parts = [
        f"{what} {', '.join(repr(name) for name in wrong[:3])}"
        + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        for what, wrong in (
            ("it lacks", [name for name in labels if name not in found]),
            ("it also has", [name for name in names if name not in known]),
        )
        if wrong
    ]
    if parts:
        raise UserError(
            f"{where}: other labels than those of {first}: {'; '.join(parts)}; compare models of "
            "the same labels"
        )


def device_name(device):
    """The processor's name, or the GPU's."""
    if device.startswith("gpu") and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
        return ", ".join(sorted(set(filter(None, names)))) or device
    return utils.processor()


# --------------------------------------------------------------------------------------- decisions
def decisions_of(labeller, labels, texts):
    """What a model gives, as predict.py and infer.py do: 0/1 CSR [texts, classes], the classes in
    the order of `labels`."""
    place = {name: i for i, name in enumerate(labeller.info.labels)}
    order = [place[name] for name in labels]
    chunks = labeller.stream(texts)
    parts = [sparse.csr_matrix(decisions[:, order].astype(np.int32)) for _, decisions, _ in chunks]
    return sparse.vstack(parts, "csr")


def time_in_turns(labellers, texts):
    """Seconds of every model for one part of the texts after the other, [parts, models], and the
    number of these texts.

    What else runs on the machine then slows all of them, and each comes first as often. Long sets
    are represented by TIMED texts.
    """
    chosen = np.linspace(0, len(texts) - 1, min(len(texts), TIMED)).astype(int)
    size = max(4 * labellers[0].batch_size, -(-len(chosen) // PARTS))
    parts = np.array_split(chosen, -(-len(chosen) // size))
    seconds = np.zeros((len(parts), len(labellers)))
    for number, part in enumerate(tqdm(parts, "speed", leave=False, disable=None)):
        chunk = [texts[i] for i in part]
        turns = list(enumerate(labellers))
        for i, labeller in turns if number % 2 == 0 else turns[::-1]:
            start = time.perf_counter()
            labeller.decide(chunk)
            seconds[number, i] = time.perf_counter() - start
    return seconds, len(chosen)


# -------------------------------------------------------------------------------------------- main
def run(args):
    """evaluate.py --compare."""
    models = read_models(args)
    labels, dev = models[0].info.labels, Path(args.dataset_dir) / args.dev_file
    texts, label_ids = utils.read_examples(dev, labels)
    outputs = [path for path in (args.changed_path, args.json_path, args.report_path) if path]
    inputs = [dev, Path(args.dataset_dir) / (args.label_file or "label.txt")]
    for one in models:
        inputs += [*utils.model_files(one.folder), *one.folder.glob("*.onnx")]
        inputs += [Path(one.path + suffix) for suffix in (*utils.GRAPH_SUFFIXES, ".pdiparams")]
    utils.check_outputs(outputs, inputs)
    labellers = [one.load(args) for one in models]
    given = []
    for one, labeller in zip(models, labellers):
        labeller.desc = one.name
        given.append(decisions_of(labeller, labels, texts))
        warn(one, labeller)
        labeller.desc = None
    seconds, num_timed = time_in_turns(labellers, texts)
    gold = report.indicator(label_ids, len(labels))
    result = {
        "dev": utils.printable(str(dev)),
        "samples": len(texts),
        "bootstrap": {"percent": differences.LEVEL, "resamples": args.resamples, "seed": args.seed},
        "device": device_name(args.device),
        "cores": utils.num_cores(),
        "timed": {"texts": num_timed, "parts": len(seconds)},
        **differences.figures(labels, gold, given, args.resamples, args.seed),
    }
    costs = [cost(one, seconds, i, num_timed) for i, one in enumerate(models)]
    result["models"] = [{**a, **b} for a, b in zip(costs, result["models"])]
    log_result(result)
    changed = differences.changed_texts(gold, given)
    with utils.atomic_file(args.changed_path) as file:
        write_changed(file, models, texts, label_ids, given, sorted(changed))
    logger.info("Texts with other labels saved in %s", args.changed_path)
    if args.json_path:
        utils.write_json(args.json_path, result)
        logger.info("Report saved in %s", args.json_path)
    if args.report_path:
        page = render(models, result, labels, texts, label_ids, given, changed)
        with utils.atomic_file(args.report_path) as file:
            file.write(utils.printable(page))
        logger.info("Page saved in %s; open it in a browser", args.report_path)


def warn(one, labeller):
    if one.info.thresholds is not None:
        message = "%s has tuned thresholds: figures on the set they come from are optimistic"
        logger.warning(message, one.spec)
    if labeller.counts["cut"]:
        logger.info("%s:", one.spec)
        labeller.log_truncation()


def cost(one, seconds, i, num_texts):
    """Speed and size of a model, the i-th one; seconds: [parts, models]."""
    total, ratios = seconds.sum(axis=0), seconds[:, 0] / seconds[:, i]
    return {
        "name": one.name,
        "model": utils.printable(one.spec),
        "engine": one.engine,
        "max_seq_length": one.info.max_seq_length,
        "bytes": sum(file.stat().st_size for file in one.files()),
        "texts_per_second": float(num_texts / total[i]),
        "speed_ratio": float(total[0] / total[i]),  # to the first model
        "speed_ratio_of_parts": [float(ratios.min()), float(ratios.max())],
    }


def class_ids(given):
    """The class ids of each text."""
    return np.split(given.indices, given.indptr[1:-1])


def write_changed(file, models, texts, label_ids, given, rows):
    """The texts of these indices with their gold labels and those of every model."""
    labels, columns = models[0].info.labels, [label_ids, *map(class_ids, given)]
    heads = ["Label", *(utils.cell(one.spec) for one in models), "Text"]
    file.write(utils.printable("\t".join(heads)) + "\n")
    for i in rows:
        names = [",".join(labels[j] for j in sorted(column[i])) for column in columns]
        file.write("\t".join([*names, utils.cell(texts[i])]) + "\n")


# --------------------------------------------------------------------------------------------- log
def log_result(result):
    first, *others = result["models"]
    logger.info("-----Compare models-------")
    logger.info("Dev dataset size: %d", result["samples"])
    for one in result["models"]:
        logger.info("%(name)s: %(model)s (%(engine)s, max_seq_length %(max_seq_length)d)", one)
    for one in result["models"]:
        f1 = " | ".join(f"{key} F1 {with_interval(one[key])}" for key in ("micro", "macro"))
        cost = f"{one['texts_per_second']:.1f} texts/s | {one['bytes'] / 1e6:.2f} MB"
        logger.info("%s: %s | %s", one["name"], f1, cost)
    for one in others:
        pair, texts = f"{one['name']} - {first['name']}", one["texts"]
        f1 = (
            f"{key} F1 {with_interval(found, '+%')} {VERDICTS[found['verdict']][1]}"
            for key, found in one["difference"].items()
        )
        logger.info("%s: %s", pair, " | ".join(f1))
        logger.info(
            "%s: %d texts with other labels, of which %d are better and %d worse | %.2f times as "
            "fast (%.2f to %.2f) | %.2f times the size",
            *(pair, *texts.values(), one["speed_ratio"], *one["speed_ratio_of_parts"]),
            one["bytes"] / first["bytes"],
        )
    changed = [row for row in result["classes"] if any(row["gained"] + row["lost"])]
    for row in changed[:SHOWN]:
        logger.info("Class name: %s (%d texts): %s", row["label"], row["support"], of_label(row))
    message = "Labels without a change: %d; changed ones that are not listed here: %d"
    rest = max(0, len(changed) - SHOWN)
    logger.info(message, len(result["classes"]) - len(changed), rest)
    logger.info(
        "Intervals: %(percent)d%%, paired bootstrap, %(resamples)d resamples of the texts",
        result["bootstrap"],
    )
    message = "Speed: one run on %d texts, in turns (parts: %d), on %s, cores: %d"
    logger.info(message, *result["timed"].values(), result["device"], result["cores"])


def with_interval(found, form="%"):
    f1, low, high = (report.figure(v, form) for v in (found["f1"], *found["f1_interval"]))
    return f"{f1} [{low}, {high}]"


def of_label(row):
    """The first model's F1, and what the models for which the label changed made of it."""
    first, *f1s = row["f1"]
    parts = [f"A F1 {report.figure(first, '%')}"]
    for i, f1 in enumerate(f1s, 1):
        if gained_or_lost := row["gained"][i] + row["lost"][i]:
            parts.append(
                f"{string.ascii_uppercase[i]} F1 {report.figure(f1, '%')} "
                f"({report.figure(f1 - first, '+%')}; gained {row['gained'][i]}, lost "
                f"{row['lost'][i]}, right {row['right'][i]} of {gained_or_lost})"
            )
    return " | ".join(parts)


# -------------------------------------------------------------------------------------------- page
def render(models, result, labels, texts, label_ids, given, changed):
    """The HTML page as a str. result: what --json_path gets; changed: indices of texts."""
    cores = {"n": result["cores"], "cores": "core" if result["cores"] == 1 else "cores"}
    processor = report.both("{on}，{n} 核", "{on}, {n} {cores}", on=result["device"], **cores)
    about = [
        (("数据集", "Set"), result["dev"]),
        (("文本数", "Texts"), len(texts)),
        (("标签数", "Labels"), len(labels)),
        (("处理器", "Processor"), processor),
    ]
    columns = [class_ids(one) for one in given]
    cases = [
        (texts[i], *case(models, label_ids[i], [column[i].tolist() for column in columns]))
        for i in changed[: report.CASES]
    ]
    return report.fill_page(
        "comparison.html",
        {
            **result,
            "title": ("模型对比", "Model comparison"),
            "sections": SECTIONS,
            "about": about,
            "rules": [report.decision_rule(one.info) for one in models],
            "verdicts": VERDICTS,
            "labels": labels,
            "num_changed": len(changed),
            "num_same": sum(not any(row["gained"] + row["lost"]) for row in result["classes"]),
            "cases": cases,
        },
    )


def case(models, gold, given):
    """What became of a text, its gold labels, and [(models, their labels, missed labels)].

    gold, given (of each model): class ids. Models with the same labels share a row.
    """
    wrong = [len(set(gold).symmetric_difference(ids)) for ids in given]
    kind = "worse" if max(wrong) > wrong[0] else "better" if min(wrong) < wrong[0] else "same"
    rows = {}
    for one, ids in zip(models, given):
        rows.setdefault(tuple(ids), []).append(one.name)
    missed = [[i for i in gold if i not in ids] for ids in rows]
    return kind, gold, [(", ".join(rows[ids]), ids, left) for ids, left in zip(rows, missed)]
