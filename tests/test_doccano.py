"""data/doccano.py: samples become data files; splits, label files, faults of a record."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter

import doccano
import numpy as np
import pytest
from conftest import REPO, SAMPLE
from export_forms import EXPORTS, GOOD, TEXTS, annotation, as_doccano, as_jsonl, samples_of, task

import utils

NO_LABELS = "no labels in field label, labels, cats, choice or choices"


def pipe_with(content):
    """The path of a pipe that gives the content (up to 64 KiB) once."""
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    return f"/dev/fd/{reader}"


def files(folder):
    return {path.name: path.read_bytes().decode() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------ the formats
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_every_export_gives_the_same_files(convert, tmp_path, export, bom):
    status, error = convert(bom + export(TEXTS), "--is_shuffle", "False")
    assert status == 0, error
    assert files(tmp_path / "out") == {
        "train.txt": "要求离婚\t离婚\n分割房屋\t财产,债务\n没有争议\t\n",
        "data.txt": "要求离婚\n分割房屋\n没有争议\n",
        "label.txt": "债务\n离婚\n财产\n",
    }
    messages = re.findall(r"INFO\] - (.*)", error)
    out = tmp_path / "out"
    assert messages[:-1] == [
        "1 samples have no label: written as text<TAB>.",
        f"Save 3 examples to {out / 'train.txt'}.",
        f"Save 3 examples to {out / 'data.txt'}.",
        f"Save 3 labels to {out / 'label.txt'}.",
    ]
    assert re.fullmatch(r"Finished! It takes \d+\.\d\d seconds", messages[-1])
    assert utils.read_examples(out / "train.txt", utils.read_labels(out / "label.txt"))


def test_real_set_survives_the_round_trip(convert, tmp_path, shared):
    """Every format gives all samples back; each split has every label's share of the whole."""
    data = shared / "data" / "divorce"
    labels = utils.read_labels(data / "label.txt")
    original = [
        (text, [labels[i] for i in ids])
        for text, ids in zip(*utils.read_examples(data / "train.txt", labels))
    ]
    written = []
    for export in EXPORTS.values():
        flags = ["--label_file", data / "label.txt", "--overwrite"]
        assert convert(export(original), *flags, splits=("0.8", "0.1", "0.1"))[0] == 0
        written.append(files(tmp_path / "out"))
    assert all(content == written[0] for content in written)
    parts = [samples_of(tmp_path / "out" / name) for name in ("train.txt", "dev.txt", "test.txt")]
    assert sorted(sum(parts, [])) == sorted(original) and len(original) == 14377
    assert utils.read_labels(tmp_path / "out" / "label.txt") == labels
    assert written[0]["data.txt"].splitlines() == [text for text, _ in parts[2]]

    def share(samples):
        counts = Counter(name for _, names in samples for name in names)
        return np.array([counts[name] / len(samples) for name in labels])

    for part, ratio in zip(parts, (0.8, 0.1, 0.1)):
        assert abs(share(part) - share(original)).max() < 0.003  # at random 0.02
        assert abs(len(part) / (14377 * ratio) - 1) < 0.02 + 1e-3


def test_annotators_are_settled_by_majority(convert, tmp_path):
    votes = [annotation(names) for names in (["甲", "乙"], ["甲"], ["乙", "丙", "丙"])]
    tasks = [
        task("三人", *votes, number=1),
        task("两人", annotation(["甲", "乙"]), annotation(["乙"]), number=2),
        task("不一致", annotation(["甲"]), annotation(["乙"]), number=3),
        task("取消", annotation(["丙"], was_cancelled=True), annotation(["甲"]), number=4),
        task("没有标注", number=5),
        task("全部取消", annotation(["丙"], was_cancelled=True), number=6),
        task("审核", *votes, annotation(["丁"], ground_truth=True), number=7),
    ]
    status, error = convert(json.dumps(tasks), "--is_shuffle", "False")
    assert status == 0
    assert (tmp_path / "out" / "train.txt").read_text("utf-8") == (
        "三人\t甲,乙\n两人\t乙\n取消\t甲\n审核\t丁\n"
    )
    assert "- 3 texts have several annotators, 3 of them conflict: the majority decides." in error
    assert "- Left out 2 tasks without annotation." in error
    message = "Left out 1 texts: no label was given by a majority of their annotators."
    assert f"[ WARNING] - {message}" in error  # 不一致 is no sample without labels


def test_annotators_of_json_min_are_records_of_the_same_task(convert, tmp_path):
    record = {"id": 1, "text": "文", "要素": {"choices": ["甲", "乙"]}}
    records = [record, {**record, "要素": "乙"}, {"id": 2, "text": "文", "要素": "甲"}]
    assert convert(json.dumps(records), "--is_shuffle", "False")[0] == 0
    assert (tmp_path / "out" / "train.txt").read_text("utf-8") == "文\t乙\n文\t甲\n"


def test_fields_of_other_names(convert, tmp_path):
    records = [{"id": 1, "内容": "甲方", "备注": "无", "结论": ["离婚"]}]
    status, error = convert(records)
    hint = "; name the right one with --label_field: 内容, 备注, 结论\n"
    assert status == 2 and error.endswith(NO_LABELS + hint)
    status, error = convert(records, "--label_field", "结论")
    hint = "; name the right one with --text_field: 内容, 备注\n"
    assert status == 2 and error.endswith("export.any:1: no text in field data or text" + hint)
    status, error = convert(records, "--label_field", "结果", "--text_field", "内容")
    message = (
        "no field 结果 among the annotations, only id, 内容, 备注, 结论; correct --label_field\n"
    )
    assert status == 2 and error.endswith(message)
    assert convert(records, "--label_field", "结论", "--text_field", "内容")[0] == 0
    assert (tmp_path / "out" / "train.txt").read_text("utf-8") == "甲方\t离婚\n"


def test_two_fields_of_choices_need_a_name(convert, tmp_path):
    record = {"id": 1, "text": "文", "a": {"choices": ["甲"]}, "b": {"choices": ["乙"]}}
    status, error = convert([record])
    assert status == 2 and "choices in a, b; name one or more with --label_field" in error
    assert convert([record], "--label_field", "b")[0] == 0
    assert (tmp_path / "out" / "label.txt").read_text("utf-8") == "乙\n"


# ------------------------------------------------------------------------------------- the content
def test_text_comes_to_stand_on_one_line(convert, tmp_path):
    text = " \n第一行\r\n第二行\t第三\u2028行\n\n第四行 \t"
    status, error = convert([{"text": text, "label": [" 甲 ", "乙", "甲"]}])
    assert status == 0 and "[ WARNING] - Tabs or line breaks in 1 texts became spaces." in error
    train = (tmp_path / "out" / "train.txt").read_bytes().decode()
    assert train == "第一行 第二行 第三\u2028行 第四行\t甲,乙\n"


def test_dirty_drops_the_old_label(convert, tmp_path):
    texts = ["文一\t旧,标签", "文二\t", "文\t三\t旧"]
    records = [{"data": text, "label": ["新"]} for text in texts]
    (tmp_path / "names.txt").write_text("旧\n新\n", "utf-8")
    flags = ["--dirty", "--label_file", tmp_path / "names.txt"]
    assert convert(records, *flags, "--is_shuffle", "False")[0] == 0
    assert files(tmp_path / "out") == {"train_dirty.txt": "文一\t新\n文二\t新\n文 三\t新\n"}
    status, error = convert([{"text": "文", "label": ["新"]}], *flags, "--overwrite")
    assert status == 2 and "no text has a tab and an old label after it" in error


def test_dirty_takes_no_new_labels(convert, tmp_path):
    """A typing error of the one who corrects would be one more class."""
    records = [{"text": "文一\t旧", "label": ["新"]}, {"text": "文二\t旧", "label": ["薪"]}]
    label_path, out = tmp_path / "out" / "label.txt", tmp_path / "out"
    status, error = convert(records, "--dirty")
    assert status == 2 and error == (
        f"error: {label_path}: not found, and --dirty takes no new labels; "
        "give the training set's label file with --label_file\n"
    )
    out.mkdir()
    label_path.write_text("旧\n新\n", "utf-8")
    for flag in ("--dirty", "--valid"):
        status, error = convert(records, flag)
        reason = f"label '薪' is not in {label_path}; add it there at the end"
        assert status == 2 and error == f"error: {tmp_path / 'export.any'}:2: {reason}\n"
        assert os.listdir(out) == ["label.txt"]
    assert convert(records[:1], "--dirty")[0] == 0
    assert (out / "train_dirty.txt").read_text("utf-8") == "文一\t新\n"


def test_valid_is_one_file_without_labels(convert, tmp_path):
    assert convert(as_doccano(TEXTS), "--valid", "--is_shuffle", "False")[0] == 0
    content = "要求离婚\t离婚\n分割房屋\t财产,债务\n没有争议\t\n"
    assert files(tmp_path / "out") == {"valid.txt": content}


def test_unlabelled_samples_can_be_left_out(convert, tmp_path):
    status, error = convert(as_doccano(TEXTS), "--skip_unlabeled", "--is_shuffle", "false")
    assert status == 0 and "1 samples have no label: left out." in error
    lines = (tmp_path / "out" / "train.txt").read_text("utf-8").splitlines()
    assert lines == ["要求离婚\t离婚", "分割房屋\t财产,债务"]


def test_label_file_keeps_the_class_ids(convert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "label.txt").write_text("财产\n离婚\n旧标签\n债务\n", encoding="utf-8")
    flags = ["--label_file", tmp_path / "out" / "label.txt"]
    assert convert(as_doccano(TEXTS), *flags)[0] == 0
    assert (tmp_path / "out" / "label.txt").read_text("utf-8") == "财产\n离婚\n旧标签\n债务\n"
    status, error = convert(
        as_doccano([*TEXTS, ("新", ["甲"]), ("新", ["乙"])]), *flags, "--overwrite"
    )
    first = f"error: {tmp_path / 'export.any'}:4: label '甲' is not in --label_file"
    assert status == 2 and first in error and ":5: label '乙' is not in" in error


# -------------------------------------------------------------------------------------- the splits
def many(count, seed=0):
    """Texts with labels of falling frequency, some without any, some that come twice."""
    rng = np.random.default_rng(seed)
    names = [f"标签{i}" for i in range(8)]
    chance = 0.5 ** np.arange(1, 9)
    samples = []
    for i in range(count):
        given = [name for name, p in zip(names, chance) if rng.random() < p]
        samples += [(f"文本{i}", given)] * (2 if i % 10 == 0 else 1)
    return samples


@pytest.mark.parametrize(
    "splits, names",
    [
        (["1"], ["train.txt"]),
        (["1.0"], ["train.txt"]),
        (["0.8", "0.2"], ["train.txt", "dev.txt"]),
        (["0.7", "0.2", "0.1"], ["train.txt", "dev.txt", "test.txt"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("shuffle", ["True", "False"])
def test_splits(convert, tmp_path, splits, names, shuffle):
    samples = many(400)
    status, error = convert(as_doccano(samples), "--is_shuffle", shuffle, splits=splits)
    assert status == 0
    assert set(files(tmp_path / "out")) == {*names, "data.txt", "label.txt"}
    parts = [samples_of(tmp_path / "out" / name) for name in names]
    assert Counter(map(str, sum(parts, []))) == Counter(map(str, samples))
    texts = [{text for text, _ in part} for part in parts]
    assert sum(map(len, texts)) == len(set.union(*texts))  # a text is in one split only
    for part, ratio in zip(parts, splits):
        assert abs(len(part) - len(samples) * float(ratio)) < 0.02 * len(samples)
    in_order = [sorted(part, key=samples.index) == part for part in parts]
    assert in_order == [shuffle == "False"] * len(parts)
    if shuffle == "False":
        assert parts[0][:300] == samples[:300]
    if len(splits) > 1:
        assert "40 duplicate texts, 0 with conflicting labels; each is in one split only" in error


def test_only_the_seed_decides(tmp_path):
    """Sets of strings are iterated in another order in every process."""
    (tmp_path / "export.jsonl").write_text(as_jsonl(as_doccano(many(200))), encoding="utf-8")
    for name, hash_seed, flags in (("a", "1", []), ("b", "2", []), ("c", "1", ["--seed", "4"])):
        command = [sys.executable, REPO / "data" / "doccano.py", "--save_dir", tmp_path / name]
        command += ["--doccano_file", tmp_path / "export.jsonl", *flags]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a["label.txt"] == c["label.txt"]
    assert a["dev.txt"] != c["dev.txt"] and set(a["dev.txt"]) > {"\t", "\n"}


def test_stratified_far_better_than_at_random():
    samples, rng = many(2000), np.random.default_rng(0)
    ids = [[int(name[2:]) for name in names] for _, names in samples]
    targets, sizes = utils.multi_hot(ids, 8), [len(ids) - 220, 220]
    chosen = np.array(doccano.stratify([[i] for i in range(len(ids))], ids, 8, sizes, rng))

    def gap(dev):
        return abs(targets[dev].mean(0) - targets.mean(0)).max()

    at_random = [gap(rng.permutation(len(ids))[:220]) for _ in range(20)]
    assert gap(chosen == 1) < 0.01 < np.mean(at_random)


@pytest.mark.parametrize("num_labels", [20, 1000])
def test_stratifying_is_quick(num_labels):
    rng, count = np.random.default_rng(0), 16000
    ids = [
        [int(i)] + ([int(i) // 2] if i % 3 else []) for i in rng.integers(num_labels, size=count)
    ]
    ids = [list(dict.fromkeys(i)) for i in ids]
    start, groups = time.process_time(), [[i] for i in range(count)]
    chosen = np.array(doccano.stratify(groups, ids, num_labels, [12800, 3200], rng))
    assert time.process_time() - start < 5
    assert abs((chosen == 1).sum() - 3200) <= 0.02 * 12800
    targets = utils.multi_hot(ids, num_labels)
    assert abs(targets[chosen == 1].sum(0) - 0.2 * targets.sum(0)).max() <= 6


def test_rare_labels_leave_no_split_empty():
    """Each alone would go to the largest split."""
    rng, ids = np.random.default_rng(0), [[i] for i in range(100)]
    chosen = doccano.stratify([[i] for i in range(100)], ids, 100, [80, 10, 10], rng)
    assert sorted(map(chosen.count, range(3))) == [9, 10, 81]


# -------------------------------------------------------------------------------------- the faults


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'data': 'x'}", "not JSON; export JSONL from doccano or JSON from Label Studio"),
        ("5", "not JSON; export JSONL from doccano or JSON from Label Studio"),
        ('{"label": ["甲"]}', "no text in field data or text; delete the record, which has no"),
        ('{"data": 5, "label": ["甲"]}', "no text in field data or text; delete the record,"),
        ('{"a": "x", "label": ["甲"]}', "no text in field data or text; name the right one with -"),
        ('{"data": "x", "label": [[0, 3, "甲"]]}', 'label [0, 3, "甲"] is no name; export text'),
        ('{"data": "x", "label": [3]}', "label 3 is no name; export text classification, not"),
        ('{"data": "x", "label": ["甲,乙"]}', "label '甲,乙' has a comma, tab or line break"),
        ('{"data": "x", "label": ["甲\\t乙"]}', "label '甲\\t乙' has a comma, tab or line break"),
        ('{"data": "x", "label": ["甲\\n乙"]}', "label '甲\\n乙' has a comma, tab or line break"),
        ('{"data": "x", "label": [" "]}', "empty label name; rename it"),
        ('{"data": " \\n", "label": ["甲"]}', "empty text; delete the record"),
        ('{"data": "\\ud83d", "label": ["甲"]}', "invalid Unicode (lone surrogate)"),
        ('{"data": "x", "label": ["\\ud83d"]}', "invalid Unicode (lone surrogate)"),
    ],
    ids=[
        "not JSON",
        "number",
        "no text",
        "text is a number",
        "text in another field",
        "spans",
        "label ids",
        "comma",
        "tab",
        "line break",
        "empty label",
        "empty text",
        "text with a surrogate",
        "label with a surrogate",
    ],
)
def test_faulty_record(convert, tmp_path, line, message):
    status, error = convert(f"{GOOD}\n{line}\n{GOOD}")
    assert status == 2 and len(error.splitlines()) == 1
    assert error.startswith(f"error: {tmp_path / 'export.any'}:3: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("faults", [10, 12])
def test_ten_faults_are_listed_at_once(convert, faults):
    status, error = convert(as_doccano([("好", ["甲"])] + [("", ["甲"])] * faults))
    assert status == 2 and error.count("empty text") == 10
    assert error.endswith("... and 2 more such lines\n") == (faults == 12)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--splits", "0.8", "0.3"], "--splits: every share must be above 0 and their sum 1"),
        (["--splits", "1", "0"], "--splits: every share must be above 0 and their sum 1"),
        (["--splits", "0.5", "0.2", "0.2", "0.1"], "--splits: give 1, 2 or 3 shares"),
        (["--splits", "0.9", "0.05", "0.05"], "3 samples are too few for 3 splits"),
        (["--splits", "0.8", "0.2", "--valid"], "--valid and --dirty write one file; add --splits"),
        (["--valid", "--dirty"], "--dirty: not allowed with argument --valid"),
        (["--is_shuffle", "maybe"], "maybe is neither True nor False"),
        (["--task_type", "hierarchical"], "--task_type: invalid choice: 'hierarchical'"),
        (["--label_file", "none.txt"], "none.txt: No such file or directory; check the path"),
        (["--doccano_file", "none.jsonl"], "none.jsonl: No such file or directory; check the path"),
        (["--save_dir", SAMPLE / "label.txt"], "label.txt: "),
    ],
)
def test_bad_arguments(convert, tmp_path, flags, message):
    status, error = convert(as_doccano(TEXTS), *flags)
    assert status == 2 and message in error.splitlines()[-1]
    assert os.listdir(tmp_path) == ["export.any"]


@pytest.mark.parametrize("name", ["train.txt", "dev.txt", "data.txt", "label.txt"])
def test_existing_file_is_kept(convert, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text("alt")
    status, error = convert(as_doccano(TEXTS), splits=("0.7", "0.3"))
    assert status == 2 and error == f"error: {path}: exists; add --overwrite to replace it\n"
    assert files(tmp_path / "out") == {name: "alt"}
    assert convert(as_doccano(TEXTS), "--overwrite", splits=("0.7", "0.3"))[0] == 0
    assert "alt" not in files(tmp_path / "out")[name]


def test_file_of_an_earlier_run_is_pointed_out(convert, tmp_path):
    assert convert(as_doccano(many(50)), splits=("0.6", "0.2", "0.2"))[0] == 0
    status, error = convert(as_doccano(many(50)), "--overwrite", splits=("0.8", "0.2"))
    assert status == 0 and f"{tmp_path / 'out' / 'test.txt'} is of an earlier run" in error


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_export_is_read_once(tmp_path, run_cli, export):
    """A pipe cannot be read again, neither from its start nor by its name."""
    samples = many(200)
    argv = ["--splits", "1", "--is_shuffle", "False", "--save_dir", tmp_path]
    argv += ["--doccano_file", pipe_with(export(samples))]
    argv += ["--label_file", pipe_with("".join(f"标签{i}\n" for i in range(8)))]
    status, error = run_cli(doccano.main, argv)
    assert status == 0 and samples_of(tmp_path / "train.txt") == samples, error


def test_lines_end_at_a_line_feed_alone(convert, tmp_path):
    texts = ["甲\u2028乙", "丙\x85丁", "戊\x0b己\x1c庚"]
    status, error = convert(
        [{"text": text, "label": ["标签"]} for text in texts], "--is_shuffle", "False"
    )
    assert status == 0 and "became spaces" not in error
    train = (tmp_path / "out" / "train.txt").read_bytes().decode()
    assert train == "".join(f"{text}\t标签\n" for text in texts)


@pytest.mark.parametrize("flag", ["--doccano_file", "--label_file"])
def test_inputs_are_not_replaced(tmp_path, run_cli, flag):
    """An export or label file that is named like a result, in the folder of the results."""
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"--doccano_file": out / "export.jsonl", "--label_file": out / "names.txt"}
    inputs[flag] = out / "train.txt"
    inputs["--doccano_file"].write_text(as_jsonl(as_doccano(TEXTS)), encoding="utf-8")
    inputs["--label_file"].write_text("离婚\n财产\n债务\n", encoding="utf-8")
    before = files(out)
    argv = ["--splits", "1", "--overwrite", "--save_dir", out]
    status, error = run_cli(doccano.main, [*argv, *sum(map(list, inputs.items()), [])])
    assert status == 2 and f"cannot write {out / 'train.txt'}: it is an input" in error
    assert files(out) == before


def test_label_file_of_the_result_folder_stays(tmp_path, run_cli):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "label.txt"
    path.write_bytes("\ufeff离婚\r\n财产\r\n债务".encode())
    content = path.read_bytes()
    (tmp_path / "export.jsonl").write_text(as_jsonl(as_doccano(TEXTS)), encoding="utf-8")
    argv = ["--doccano_file", tmp_path / "export.jsonl", "--save_dir", tmp_path / "out"]
    status, _ = run_cli(doccano.main, [*argv, "--label_file", path, "--splits", "1", "--overwrite"])
    assert status == 0 and path.read_bytes() == content
    assert set(files(tmp_path / "out")) == {"train.txt", "data.txt", "label.txt"}


def test_full_disk_leaves_the_old_files(convert, tmp_path, monkeypatch):
    assert convert(as_doccano(many(50)), splits=("0.8", "0.2"))[0] == 0
    old, count, fsync = files(tmp_path / "out"), 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count > 3:  # the fourth file
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    status, error = convert(as_doccano(many(60)), "--overwrite", splits=("0.8", "0.2"))
    assert status == 2 and "No space left on device; nothing was replaced" in error
    assert files(tmp_path / "out") == old


def test_the_sample_folder_can_be_rebuilt(convert, tmp_path):
    """The shipped train.txt as an annotation export gives a data folder that the readers accept."""
    samples = samples_of(SAMPLE / "train.txt")
    flags = ["--label_file", SAMPLE / "label.txt"]
    assert convert(as_doccano(samples), *flags, splits=("0.8", "0.2"))[0] == 0
    labels = utils.read_labels(tmp_path / "out" / "label.txt")
    assert labels == utils.read_labels(SAMPLE / "label.txt")
    texts = []
    for name in ("train.txt", "dev.txt"):
        found, ids = utils.read_examples(tmp_path / "out" / name, labels)
        assert utils.multi_hot(ids, len(labels)).sum(0).min() > 0  # each label is in both
        texts += found
    assert sorted(texts) == sorted(text for text, _ in samples)
