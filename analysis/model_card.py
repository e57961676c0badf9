"""The model card: what is known of a model, for whoever is given it. export_model.py writes it.

Its facts come from config.json, from the log that train.py leaves beside the weights and, if a dev
set is given, from an evaluation of the exported model; what none of them tells is "未知" (unknown).
"Model Cards for Model Reporting", Mitchell et al. 2019.
"""

import contextlib
import json
import re
from pathlib import Path

import metric
import utils

UNKNOWN = "未知"
LANGUAGES = {"zh": "中文", "en": "英文", None: UNKNOWN}
LOG_FILE = "train_log.jsonl"  # of train.py
SHA256 = re.compile("[0-9a-f]{64}")
NAME = "MODEL_CARD.md"  # in a bundle
INTRODUCTION = (
    "# 文本多标签分类模型\n\n给一条文本打上零个、一个或多个标签，共 {0} 个。"
    "本页由 export_model.py 写成，取自 config.json、训练日志和导出时的评估；"
    "没有记录的写“未知”。\n\n"
    "**English summary.** A multi-label text classifier with {0} labels: a text gets a label if "
    "the sigmoid of its logit is greater than the label's threshold. export_model.py wrote this "
    "card from config.json, the training log and an evaluation at export; what none of them tells "
    "is 未知 (unknown). The sections: the model; figures per label on the dev set (support, "
    "precision, recall, F1, threshold); flags of the training; use and limits; loading.\n\n"
)
LOADING = """```shell
python deploy/predictor/infer.py --device cpu --model_path_prefix {}/float32 --dataset_dir data
```
"""


def dev_report(forward, tokenizer, info, file, texts, label_ids):
    """MultiLabelCounts.report of a dev set, with its "file" (a name) and "texts", and in "cut" how
    many of these were cut. forward, tokenizer: see utils.Labeller."""
    labeller = utils.Labeller(forward, tokenizer, info, desc="dev")
    counts, start = metric.MultiLabelCounts(len(info.labels)), 0
    for chunk, decisions, _ in labeller.stream(texts):
        rows = label_ids[start : start + len(chunk)]
        counts.update(decisions, utils.multi_hot(rows, len(info.labels)))
        start += len(chunk)
    cut = labeller.counts["cut"]
    return {"file": file, "texts": texts, "cut": cut, **counts.report(info.labels)}


def read_log(path):
    """(how the training began, the figures of its best epoch) in a train_log.jsonl; {} for what is
    missing or damaged."""
    records = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if isinstance(record.get("flags", {}), dict):
                records[record["event"]] = record
    return records.get("start", {}), records.get("end", {})


def language_of(model_name, texts):
    """zh or en by the name of ERNIE's weights, zh if most letters are Chinese, or None."""
    if known := re.fullmatch(r"ernie-.*-(zh|en)", model_name):
        return known[1]
    letters = [c for text in texts for c in text if c.isalpha()]
    return "zh" if 2 * sum("\u4e00" <= c <= "\u9fff" for c in letters) > len(letters) else None


def describe(folder, net, info, report=None):
    """(the card in Markdown up to the heading of its last section, loading; language or None).

    folder: the checkpoint; net: its model; info: its ModelInfo; report: see dev_report; None: no
    dev set was given.
    """
    config, (start, best) = utils.read_json(folder / utils.CONFIG_FILE), read_log(folder / LOG_FILE)
    base = Path(str(start.get("model_name", ""))).name
    language = language_of(base, report["texts"] if report else info.labels)
    about = {
        "任务": "文本多标签分类",
        "语言": LANGUAGES[language],
        "结构": structure(config, net),
        "起始权重": f"{escape(base)}（训练时 `--model_name` 的最后一段）" if base else UNKNOWN,
        "训练集": number_of_texts(start.get("train_texts")),
        "开发集": number_of_texts(start.get("dev_texts")),
        "最大长度": f"{info.max_seq_length} 个词元，含 [CLS] 和 [SEP]；更长的文本只看开头",
        "判定": f"概率大于阈值；{limits(info)}",
        "许可证": UNKNOWN,
    }
    flags = start.get("flags", {})
    processes = flags.get("number of processes", UNKNOWN)
    flags = " ".join(flags_of(flags)) or f"（参数{UNKNOWN}）"
    sections = {
        "模型": table(["项目", "内容"], about.items()),
        "开发集上的结果": results(info, report, best),
        "训练": f"```text\ntrain.py {flags}\n```\n\n进程数：{processes}。",
        "用途与限制": uses(report),
    }
    text = "\n".join(f"## {name}\n\n{body}\n" for name, body in sections.items())
    text = f"{INTRODUCTION.format(len(info.labels))}{text}\n## 载入\n\n"
    return utils.printable(text), language


def structure(config, net):
    names = "num_hidden_layers", "hidden_size", "num_attention_heads"
    layers, hidden, heads = (config.get(name, UNKNOWN) for name in names)
    kind = str(config.get("model_type", UNKNOWN)).upper()
    pruned = f"，裁剪后保留 {width}" if (width := config.get("width_mult")) else ""
    size = f"{sum(value.size for value in net.state_dict().values()) / 1e6:.1f} M 个参数"
    return f"{kind}，{layers} 层，隐藏层 {hidden}，{heads} 个注意力头{pruned}，{size}"


def number_of_texts(number):
    return UNKNOWN if number is None else f"{number} 条"


def limits(info):
    least = f"至少 {info.min_labels} 个" if info.min_labels else "可以没有标签"
    most = "个数不限" if info.max_labels is None else f"至多 {info.max_labels} 个"
    return f"每条文本{least}，{most}"


def results(info, report, best):
    """The section on the dev set."""
    thresholds = info.thresholds or [metric.DEFAULT_THRESHOLD] * len(info.labels)
    thresholds = [f"{threshold:.3f}" for threshold in thresholds]
    logged = UNKNOWN
    if "micro_f1" in best:
        logged = " / ".join(f"{100 * best[f'{name}_f1']:.2f}%" for name in ("micro", "macro"))
    logged = f"训练日志里最好一轮的 Micro / Macro F1（阈值 0.5，标签个数不限）：{logged}。"
    if report is None:
        source = (
            f"每个标签的样本数、精确率、召回率、F1：{UNKNOWN}（导出时没有给出 --dataset_dir）。"
        )
        rows = zip(map(escape, info.labels), thresholds)
        return "\n\n".join([source, logged, table(["标签", "阈值"], rows)])
    exact = f"标签完全正确的占 {100 * report['subset_accuracy']:.2f}%"
    source = f"{escape(report['file'])}：{report['samples']} 条，{report['cut']} 条超过最大长度。"
    source += f"由导出的模型按上面的判定算出；{exact}。"
    doubt = "train.py 按开发集选最好的一轮，evaluate.py 按它选阈值；若就是这份数据，数字偏乐观。"
    rows = [
        [escape(row["label"]), row["support"], *percents(row), threshold]
        for row, threshold in zip(report["classes"], thresholds)
    ]
    rows += [[name, "", *percents(report[name.lower()]), ""] for name in ("Micro", "Macro")]
    head = ["标签", "样本数", "精确率(%)", "召回率(%)", "F1(%)", "阈值"]
    return "\n\n".join([source + doubt, logged, table(head, rows)])


def percents(figures):
    return [f"{100 * figures[name]:.2f}" for name in ("precision", "recall", "f1")]


def uses(report):
    """The section on use and limits."""
    classes = report["classes"] if report else []
    unseen = [escape(row["label"]) for row in classes if not row["support"]]
    failed = [escape(row["label"]) for row in classes if row["support"] and not row["f1"]]
    lines = [
        "用途：给与训练数据同类的文本打标签。",
        f"训练数据与起始权重的来源、内容和许可：{UNKNOWN}。",
    ]
    if unseen:
        lines.append(f"开发集里没有、因而无从评价的标签（{len(unseen)} 个）：{'、'.join(unseen)}。")
    if failed:
        lines.append(f"在开发集上 F1 为 0 的标签（{len(failed)} 个）：{'、'.join(failed)}。")
    lines.append(f"在其他领域的文本上的效果、对不同人群的偏差、概率是否校准：{UNKNOWN}。")
    return "\n".join(f"* {line}" for line in lines)


def flags_of(flags):
    """What train.py's log calls its flags, without folders and the hashes of files."""
    for name, value in flags.items():
        if value is None or value is False or " " in name or SHA256.fullmatch(str(value)):
            continue
        if name == "init_from_ckpt":
            value = Path(value).name
        yield f"--{name}" if value is True else f"--{name} {value}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def escape(name):
    """A name as it stands in Markdown."""
    return re.sub(r"([\\|*_`<>\[\]&~#])", r"\\\1", name)
