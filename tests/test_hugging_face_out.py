"""export_model.py --hugging_face, and the model card: what is written, and that it is the model.

TORCH_PYTHON names the Python of an environment with requirements-torch.txt; CI has one.
"""

import json
import os
import re
import subprocess
from types import SimpleNamespace

import hugging_face
import init_model
import model_card
import numpy as np
import pytest
from conftest import GRAPH_FILES, REPO, needs_environment
from safetensors import safe_open
from test_hugging_face import hugging_face_names, reference
from tokenizers import Tokenizer

import export_model
import metric
import model as models
import train
import utils

FILES = {
    *("config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"),
    "README.md",
}
LABELS = ["离婚", "财产|房产", "抚养"]
TEXTS = [
    "婚后生育一女，现原告要求离婚。",
    "价值¥60000元★的房屋①套，㎡与μ、×÷＋±≈",
    "  空格\t和 Latin naïve café, ABC-1 [MASK] ½",
    "",
    "原被告双方均认可" * 40,
]


def make_checkpoint(folder, source, labels, noise=0.1, **settings):
    """A checkpoint of the model folder `source` in which no two parameters agree."""
    net, rng = models.load_folder(source, labels), np.random.default_rng(3)
    flags = SimpleNamespace(max_seq_length=128, init_from_ckpt=None, dropout=None)
    train.configure(net, flags, labels)
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    noisy = {k: (v + rng.normal(0, noise, v.shape)).astype("f4") for k, v in weights.items()}
    models.set_weights(net, noisy, folder)
    models.save_checkpoint(folder, net, source)
    change_config(folder, **settings)
    return folder


def change_config(folder, **changes):
    config = {**utils.read_json(folder / "config.json"), **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def export(checkpoint, folder, *flags):
    flags = ["--params_path", checkpoint, "--output_path", folder / "export", *flags]
    export_model.main([*map(str, flags), "--hugging_face", str(folder / "hf")])
    return folder / "hf"


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """An ERNIE with tuned thresholds, limits and another layer_norm_eps."""
    folder = tmp_path_factory.mktemp("ernie") / "checkpoint"
    rule = {"thresholds": [0.5, 0.25, 0.75], "min_labels": 1, "max_labels": 2}
    return make_checkpoint(folder, tiny_model, LABELS, layer_norm_eps=1e-6, **rule)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, tmp_path_factory.mktemp("exported"))


def arrays_of(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def bare(arrays):
    """As `reference` takes the names."""
    return {name.removeprefix("ernie."): array for name, array in arrays.items()}


# --------------------------------------------------------------------------------- what is written
@pytest.mark.core
def test_files_and_weights(checkpoint, exported):
    assert {path.name for path in exported.iterdir()} == FILES
    bundle = {path.name for path in (exported.parent / "export").iterdir()}
    others = {"config.json", "vocab.txt", "tokenizer_config.json", "MODEL_CARD.md"}
    assert bundle == GRAPH_FILES | others
    assert (exported / "vocab.txt").read_bytes() == (checkpoint / "vocab.txt").read_bytes()
    arrays, metadata = arrays_of(exported)
    assert metadata == {"format": "pt"}
    weights = models.load_weights(checkpoint / utils.WEIGHTS_FILE)
    expected = hugging_face_names(weights, layers=2)
    prefixed = {k if "classifier" in k else f"ernie.{k}": v for k, v in expected.items()}
    assert arrays.keys() == prefixed.keys() and len(arrays) == 42
    for name, array in arrays.items():
        assert array.dtype == np.float32 and np.array_equal(array, prefixed[name]), name


@pytest.mark.core
def test_config(exported):
    assert utils.read_json(exported / "config.json") == {
        "architectures": ["ErnieForSequenceClassification"],
        "model_type": "ernie",
        "problem_type": "multi_label_classification",
        "vocab_size": len(list(utils.read_texts(exported / "vocab.txt"))),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 160,
        "type_vocab_size": 4,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "pad_token_id": 0,
        "use_task_id": True,
        "task_type_vocab_size": 3,
        "id2label": {"0": LABELS[0], "1": LABELS[1], "2": LABELS[2]},
        "label2id": {LABELS[0]: 0, LABELS[1]: 1, LABELS[2]: 2},
        "max_seq_length": 128,
        "thresholds": [0.5, 0.25, 0.75],
        "min_labels": 1,
        "max_labels": 2,
    }
    assert utils.read_json(exported / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "do_lower_case": True,
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
    }


@pytest.mark.core
def test_tokenizer_file_gives_the_same_token_ids(checkpoint, exported):
    theirs = Tokenizer.from_file(str(exported / "tokenizer.json"))
    ours, _ = utils.encode(TEXTS, utils.load_tokenizer(checkpoint), 128)
    assert theirs.truncation is None and theirs.padding is None
    assert len(theirs.encode(TEXTS[-1]).ids) > 128
    theirs.enable_truncation(128)
    assert [theirs.encode(text).ids for text in TEXTS] == [ids.tolist() for ids in ours]
    pair = theirs.encode(*TEXTS[:2])
    first = len(ours[0])
    assert pair.ids == [*ours[0], *ours[1][1:]] and pair.type_ids.index(1) == first
    vocab = theirs.get_vocab()  # in no fixed order; some letters are also there twice as one token
    pieces = (token[2:] for token in vocab if token.startswith("##"))
    letter = min(piece for piece in pieces if piece in vocab and 2 * piece not in vocab)
    assert theirs.encode(2 * letter).tokens[1:3] == [letter, f"##{letter}"]
    assert theirs.decode(theirs.encode(2 * letter).ids) == 2 * letter


@pytest.mark.core
@pytest.mark.parametrize("task_id", [0, 2])
def test_weights_give_the_logits_of_the_model(checkpoint, tmp_path, task_id):
    """Hugging Face's ERNIE adds row 0 of the task types, PaddleNLP's that of config.json."""
    change_config(checkpoint, task_id=task_id)
    folder = export(checkpoint, tmp_path)
    encoded, _ = utils.encode(TEXTS, utils.load_tokenizer(checkpoint), 128)
    model, _ = models.load_checkpoint(checkpoint)
    change_config(checkpoint, task_id=0)
    ours = utils.logits_of(models.dygraph_forward(model), encoded, 8, 3)
    arrays = bare(arrays_of(folder)[0])
    _, pooled = reference(arrays, utils.pad(encoded)["input_ids"], 4, 1e-6)
    expected = pooled @ arrays["classifier.weight"].T + arrays["classifier.bias"]
    assert ours.std() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.core
def test_the_way_back(exported, tmp_path):
    """train.py begins with the exported weights, the classifier included."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "label.txt").write_text("\n".join(LABELS), encoding="utf-8")
    for name in ("train", "dev"):
        (data / f"{name}.txt").write_text(f"婚后生育一女\t{LABELS[2]}\n", encoding="utf-8")
    flags = f"--device cpu --dataset_dir {data} --model_name {exported} --epochs 1"
    train.main(f"{flags} --learning_rate 0 --save_dir {tmp_path / 'checkpoint'}".split())
    second = export(tmp_path / "checkpoint", tmp_path)
    first, again = arrays_of(exported)[0], arrays_of(second)[0]
    assert first.keys() == again.keys()
    assert [name for name in first if not np.array_equal(first[name], again[name])] == []
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (second / name).read_bytes() == (exported / name).read_bytes()
    assert "| 起始权重 | hf（训练时" in (second / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "place, message",
    [
        ("full", "error: --hugging_face {0}: the folder is not empty; give a new one\n"),
        ("export", "error: --hugging_face {0} is the --output_path; give another folder\n"),
        ("file", "error: cannot write {0}: "),
        ("file/hf", "error: cannot write {0}: "),
    ],
)
def test_places_that_cannot_be_written(checkpoint, tmp_path, run_cli, place, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("a")
    (tmp_path / "file").write_text("b")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    flags = ["--params_path", checkpoint, "--output_path", tmp_path / "export"]
    status, err = run_cli(export_model.main, [*flags, "--hugging_face", tmp_path / place])
    assert status == 2 and err.splitlines()[-1].startswith(message.format(tmp_path / place).strip())
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_checkpoint_is_not_replaced(checkpoint, exported, tmp_path, run_cli):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    flags = ["--params_path", checkpoint, "--output_path", tmp_path / "export", "--hugging_face"]
    status, err = run_cli(export_model.main, [*flags, f"{checkpoint}/../checkpoint"])
    assert status == 2 and err.endswith("the folder is not empty; give a new one\n")
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    status, err = run_cli(export_model.main, [*flags[:3], exported])  # as a bundle
    assert status == 2 and err.endswith("holds a checkpoint; give another folder\n")


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, run_cli, monkeypatch):
    def full(folder, *args):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "write_tokenizer", full)
    flags = ["--params_path", checkpoint, "--output_path", tmp_path / "export"]
    status, err = run_cli(export_model.main, [*flags, "--hugging_face", tmp_path / "hf"])
    assert status == 2 and err.endswith("No space left on device; nothing was replaced\n")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_come_back_leave_nothing(checkpoint, tmp_path, run_cli, monkeypatch):
    monkeypatch.setitem(hugging_face.NAMES, "norm1", "output.LayerNorm")  # as norm2
    flags = ["--params_path", checkpoint, "--output_path", tmp_path / "export"]
    status, _ = run_cli(export_model.main, [*flags, "--hugging_face", tmp_path / "hf"])
    assert status == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"width_mult": "1/2"},
            "a pruned model, and Hugging Face's have no narrower layers; give --params_path the "
            "checkpoint that was pruned",
        ),
        (
            {"model_type": "bert", "pool_act": "relu"},
            "pool_act 'relu'; Hugging Face's BERT knows tanh only",
        ),
    ],
)
def test_models_that_hugging_face_does_not_have(tiny_model, tmp_path, run_cli, settings, message):
    folder = make_checkpoint(tmp_path / "model", tiny_model, LABELS, **settings)
    flags = ["--params_path", folder, "--output_path", tmp_path / "export"]
    found = run_cli(export_model.main, [*flags, "--hugging_face", tmp_path / "hf"])
    assert found == (2, f"error: {folder / 'config.json'}: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --------------------------------------------------------------------------------- the model card
LOG = [
    {
        "event": "start",
        "model_name": "/home/somebody/ernie-3.0-nano-zh",
        "train_texts": 1200,
        "dev_texts": 4,
        "flags": {
            **{
                "max_seq_length": 128,
                "dropout": 0.0,
                "init_from_ckpt": "/home/somebody/a.pdparams",
            },
            **{"early_stop": False, "warmup": True, "visualdl_dir": None},
            **{"number of processes": 2, "label_file": "0123456789abcdef" * 4},
        },
    },
    {"event": "eval", "step": 3, "micro_f1": 0.5, "macro_f1": 0.25},
    {"event": "end", "step": 3, "micro_f1": 0.625, "macro_f1": 0.375},
]
CARD = """# 文本多标签分类模型

给一条文本打上零个、一个或多个标签，共 3 个。\
本页由 export_model.py 写成，取自 config.json、训练日志和导出时的评估；没有记录的写“未知”。

**English summary.** A multi-label text classifier with 3 labels: a text gets a label if the \
sigmoid of its logit is greater than the label's threshold. export_model.py wrote this card from \
config.json, the training log and an evaluation at export; what none of them tells is 未知 \
(unknown). The sections: the model; figures per label on the dev set (support, precision, recall, \
F1, threshold); flags of the training; use and limits; loading.

## 模型

| 项目 | 内容 |
| --- | --- |
| 任务 | 文本多标签分类 |
| 语言 | 中文 |
| 结构 | ERNIE，2 层，隐藏层 128，4 个注意力头，SIZE M 个参数 |
| 起始权重 | ernie-3.0-nano-zh（训练时 `--model_name` 的最后一段） |
| 训练集 | 1200 条 |
| 开发集 | 4 条 |
| 最大长度 | 128 个词元，含 [CLS] 和 [SEP]；更长的文本只看开头 |
| 判定 | 概率大于阈值；每条文本至少 1 个，至多 2 个 |
| 许可证 | 未知 |

## 开发集上的结果

valid.txt：4 条，1 条超过最大长度。由导出的模型按上面的判定算出；标签完全正确的占 50.00%。\
train.py 按开发集选最好的一轮，evaluate.py 按它选阈值；若就是这份数据，数字偏乐观。

训练日志里最好一轮的 Micro / Macro F1（阈值 0.5，标签个数不限）：62.50% / 37.50%。

| 标签 | 样本数 | 精确率(%) | 召回率(%) | F1(%) | 阈值 |
| --- | --- | --- | --- | --- | --- |
| 离婚 | 3 | 75.00 | 100.00 | 85.71 | 0.500 |
| 财产\\|房产 | 1 | 0.00 | 0.00 | 0.00 | 0.250 |
| 抚养 | 0 | 0.00 | 0.00 | 0.00 | 0.750 |
| Micro |  | 75.00 | 75.00 | 75.00 |  |
| Macro |  | 25.00 | 33.33 | 28.57 |  |

## 训练

```text
train.py --max_seq_length 128 --dropout 0.0 --init_from_ckpt a.pdparams --warmup
```

进程数：2。

## 用途与限制

* 用途：给与训练数据同类的文本打标签。
* 训练数据与起始权重的来源、内容和许可：未知。
* 开发集里没有、因而无从评价的标签（1 个）：抚养。
* 在开发集上 F1 为 0 的标签（1 个）：财产\\|房产。
* 在其他领域的文本上的效果、对不同人群的偏差、概率是否校准：未知。

## 载入

"""
IN_BUNDLE = """```shell
python deploy/predictor/infer.py --device cpu --model_path_prefix export/float32 --dataset_dir data
```
"""
HEADER = """---
language: zh
license: unknown
library_name: transformers
pipeline_tag: text-classification
tags:
- multi-label-classification
---

"""
IN_FOLDER = """```python
from transformers import pipeline

settings = {"top_k": None, "function_to_apply": "sigmoid"}
classify = pipeline("text-classification", model="hf", **settings)
config = classify.model.config
thresholds = config.thresholds or [0.5] * config.num_labels
thresholds = {config.id2label[i]: threshold for i, threshold in enumerate(thresholds)}
for scores in classify(["待分类的文本"], truncation=True):  # 截断到 128 个词元
    print([x["label"] for x in scores if x["score"] > thresholds[x["label"]]])
```

min_labels、max_labels（每条文本至少、至多几个标签）和阈值在 config.json 里，transformers 不用它们。
"""


@pytest.fixture(scope="module")
def constant(tiny_model, tmp_path_factory):
    """A checkpoint that gives every text the label 离婚, with a log; a dev set of four texts."""
    folder = tmp_path_factory.mktemp("constant") / "checkpoint"
    rule = {"thresholds": [0.5, 0.25, 0.75], "min_labels": 1, "max_labels": 2}
    make_checkpoint(folder, tiny_model, LABELS, **rule)
    weights = models.load_weights(folder / utils.WEIGHTS_FILE)
    weights["classifier.weight"][:] = 0
    weights["classifier.bias"][:] = [4, -4, 0.5]  # probabilities 0.98, 0.02, 0.62
    with open(folder / utils.WEIGHTS_FILE, "wb") as file:
        models.save_weights(file, weights)
    lines = [json.dumps(record) for record in LOG]
    lines.insert(1, '{"event": "train", "step": 1')  # as a killed run leaves it
    (folder / "train_log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = ["长" * 200 + "\t离婚", "二\t离婚", "三\t离婚,财产|房产", "四\t"]
    (folder.parent / "valid.txt").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.core
def test_card(constant, tmp_path):
    flags = ["--dataset_dir", constant.parent, "--dev_file", "valid.txt"]
    folder = export(constant, tmp_path, *flags)
    weights = models.load_weights(constant / utils.WEIGHTS_FILE)
    size = sum(array.size for array in weights.values()) / 1e6
    card = CARD.replace("SIZE", f"{size:.1f}")
    assert (tmp_path / "export" / "MODEL_CARD.md").read_text("utf-8") == card + IN_BUNDLE
    assert (folder / "README.md").read_text("utf-8") == HEADER + card + IN_FOLDER


@pytest.mark.core
def test_card_without_a_log_and_a_dev_set(checkpoint, exported):
    card = (exported.parent / "export" / "MODEL_CARD.md").read_text("utf-8")
    for line in (
        *("| 起始权重 | 未知 |", "| 训练集 | 未知 |", "| 开发集 | 未知 |", "| 许可证 | 未知 |"),
        "每个标签的样本数、精确率、召回率、F1：未知（导出时没有给出 --dataset_dir）。",
        "训练日志里最好一轮的 Micro / Macro F1（阈值 0.5，标签个数不限）：未知。",
        *("| 标签 | 阈值 |", "| 财产\\|房产 | 0.250 |", "train.py （参数未知）", "进程数：未知。"),
    ):
        assert f"\n{line}\n" in card, line
    assert "F1(%)" not in card and "F1 为 0" not in card


@pytest.mark.parametrize(
    "name, texts, language",
    [
        ("ernie-2.0-base-en", ["婚后"], "en"),
        ("my-ernie-zh", ["a contract"], None),
        ("", ["婚后生育一女 ab"], "zh"),
        ("", ["A contract 合同"], None),
        ("", ["123"], None),
    ],
)
def test_language_is_known_or_not(name, texts, language):
    assert model_card.language_of(name, texts) == language


def test_damaged_lines_of_the_log(tmp_path):
    lines = [
        b'{"event": "start", "st',
        b"\xff",
        b"[]",
        b"3",
        b'{"event": "start", "flags": 3}',
        b"{}",
    ]
    (tmp_path / "log").write_bytes(b"\n".join([*lines, b'{"event": "end", "micro_f1": 0.5}']))
    assert model_card.read_log(tmp_path / "log") == ({}, {"event": "end", "micro_f1": 0.5})


def test_names_that_are_not_unicode(constant, tmp_path):
    """As Python has them under another locale."""
    log = (constant / "train_log.jsonl").read_text("utf-8")
    text = log.replace("ernie-3.0-nano-zh", "m\\udce6\\udca8")
    (constant / "train_log.jsonl").write_text(text, encoding="utf-8")
    net, info = models.load_checkpoint(constant)
    card, _ = model_card.describe(constant, net, info)
    (constant / "train_log.jsonl").write_text(log, encoding="utf-8")
    assert "| 起始权重 | m\ufffd（训练时" in card.encode().decode()


def test_a_dev_set_that_does_not_fit(checkpoint, small_data, tmp_path, run_cli):
    flags = ["--params_path", checkpoint, "--output_path", tmp_path / "export", "--dataset_dir"]
    status, err = run_cli(export_model.main, [*flags, small_data])
    assert status == 2 and f"{small_data / 'label.txt'}:1: " in err
    status, err = run_cli(export_model.main, [*flags, tmp_path])
    assert (status, err) == (
        2,
        f"error: {tmp_path / 'dev.txt'}: No such file or directory; check the path\n",
    )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- in transformers
@pytest.fixture(scope="module")
def real_texts(shared):
    sets = [utils.read_texts(shared / f"data/divorce/{name}.txt") for name in ("train", "dev")]
    return [line.split("\t")[0] for lines in sets for line in lines]


def test_transformers_tokenise_and_label_as_the_checkpoints(
    shared, real_texts, minilm, constant, tmp_path
):
    """All real texts, the real vocabulary of ERNIE, and a model that began as MiniLM."""
    python = os.path.abspath(needs_environment("TORCH_PYTHON"))
    assert len(real_texts) == 15988
    texts, few = real_texts + TEXTS, [*TEXTS, *real_texts[-1611::80]]
    vocab = shared / "vocab" / "ernie_3.0_base_zh_vocab.txt"
    init_model.main(["--output_dir", str(tmp_path / "ernie"), "--vocab_file", str(vocab)])
    folders, checkpoints = [], []
    for name, source, noise in (("zh", tmp_path / "ernie", 0.1), ("en", minilm, 0.02)):
        checkpoints.append(make_checkpoint(tmp_path / f"{name}_model", source, LABELS, noise))
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        hugging_face.write_folder(
            folders[-1], *models.load_checkpoint(checkpoints[-1]), checkpoints[-1]
        )
    readme = (export(constant, tmp_path) / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    (tmp_path / "code.py").write_text(code, encoding="utf-8")

    wanted = json.dumps({"ids": texts, "logits": few, "code": "code.py"})
    result = subprocess.run(
        [python, str(REPO / "tests" / "transformers_reader.py"), "found.npz", *map(str, folders)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        input=wanted,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *kinds, labels = result.stdout.splitlines()
    about = ["multi_label_classification", LABELS]
    names = [f"{kind}ForSequenceClassification" for kind in ("Ernie", "Bert")]
    assert list(map(json.loads, kinds)) == [[name, *about] for name in names]
    assert labels == "['离婚']"  # of the card's code
    found = np.load(tmp_path / "found.npz")
    for i, checkpoint in enumerate(checkpoints):
        tokenizer = utils.load_tokenizer(checkpoint)
        ours, cut = utils.encode(texts, tokenizer, 128)
        theirs = np.split(found[f"ids{i}"], np.cumsum(found[f"lengths{i}"])[:-1])
        assert cut > 500 and len(theirs) == len(ours)
        assert [k for k, ids in enumerate(ours) if not np.array_equal(ids, theirs[k])] == []
        model, _ = models.load_checkpoint(checkpoint)
        encoded, _ = utils.encode(few, tokenizer, 128)
        logits = utils.logits_of(models.dygraph_forward(model), encoded, 16, len(LABELS))
        assert logits.std() > 0.05
        np.testing.assert_allclose(found[f"logits{i}"], logits, rtol=0, atol=1e-4)
        scores = metric.probabilities(logits[:5])
        np.testing.assert_allclose(found[f"scores{i}"], scores, rtol=0, atol=1e-4)
