"""data/doccano.py: exports of doccano and Label Studio become data files; faults are named."""

import fnmatch
import io
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import doccano
import exports
import numpy as np
import pytest
from conftest import REPO, SAMPLE

import utils

NO_LABELS = "no labels in field label, labels, cats, choice or choices"
EMPTY = ": empty, no record in it; annotate or approve texts, then export again\n"
GOOD = '{"id": 1, "data": "好", "label": ["甲"]}\n'
TEXTS = [("要求离婚", ["离婚"]), ("分割房屋", ["财产", "债务"]), ("没有争议", [])]


def as_doccano(samples, text="data", label="label", first=1):
    return [{"id": n, text: t, label: names} for n, (t, names) in enumerate(samples, first)]


def as_jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def annotation(names, **flags):
    value = {"choices": names}
    result = [{"from_name": "要素", "to_name": "text", "type": "choices", "value": value}]
    return {"id": 7, "was_cancelled": False, "result": result if names else [], **flags}


def task(text, *annotations, number=1):
    return {"id": number, "annotations": list(annotations), "data": {"text": text}}


def as_label_studio(samples):
    return [task(t, annotation(names), number=n) for n, (t, names) in enumerate(samples, 1)]


def as_json_min(samples):
    """One choice is a plain name there; without any the field is missing."""
    for number, (text, names) in enumerate(samples, 1):
        value = {"choices": names} if len(names) > 1 else (names or [None])[0]
        record = {"text": text, "id": number, "annotator": 1, "updated_at": "2022-08-22T10:00:00Z"}
        yield {**record, "要素": value} if names else record


EXPORTS = {
    "doccano new": lambda samples: as_jsonl(as_doccano(samples)),
    "doccano old": lambda samples: as_jsonl(as_doccano(samples, "text")),
    "doccano labels": lambda samples: as_jsonl(as_doccano(samples, "text", "labels")),
    "doccano JSON": lambda samples: json.dumps(as_doccano(samples)),
    "Label Studio JSON": lambda samples: json.dumps(as_label_studio(samples), indent=1),
    "Label Studio JSON-MIN": lambda samples: json.dumps(list(as_json_min(samples))),
}


def as_zip(**contents):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._anno1.jsonl", b"\x00\x05")
        for name, content in contents.items():
            archive.writestr(f"{name}.jsonl", content)
    return target.getvalue()


@pytest.fixture
def convert(tmp_path, run_cli):
    """convert(content, *flags) returns (exit status, stderr); files come to tmp_path/out."""

    def convert(content, *flags, splits=("1",)):
        content = content if isinstance(content, bytes | str) else as_jsonl(content)
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "export.any").write_bytes(content)
        argv = ["--doccano_file", tmp_path / "export.any", "--save_dir", tmp_path / "out"]
        return run_cli(doccano.main, [*argv, "--splits", *splits, *flags])

    return convert


def pipe_with(content):
    """The path of a pipe that gives the content (up to 64 KiB) once."""
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    return f"/dev/fd/{reader}"


def files(folder):
    return {path.name: path.read_bytes().decode() for path in sorted(folder.iterdir())}


def samples_of(path):
    return [
        (text, names.split(",") if names else [])
        for text, names in (line.split("\t") for line in path.read_text("utf-8").splitlines())
    ]


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


# -------------------------------------------------------------------- exports of the real tools
CASES = Path(__file__).parent / "cases" / "annotation"
TEXT = ["原告😀要求离婚。", "原告称 被告不归。", '原告说:"同意,离婚"。', "第一行。 第二行。"]
TEXT += ["首尾有空格。", "双方无共同债务。", "房产归原告。", "案号(2019)1/2号\\附件。"]
P, C, S, D, E = "有 财产", "子女/抚养", "支付，抚养费", "Divorce", "divorce"
SHARED = list(zip(TEXT, [{P, C}, {C, S}, {S, D}, {D, E}, {D, E}, {P}, set(), set()]))
ANNO1 = {0: {P}, 1: {C}, 3: {D}, 4: {E}}  # text: labels
ANNO2 = {3: {D}, 4: {P}, 5: {P}, 6: {C}}
CHOICES = {0: {P}, 2: {D}, 3: set(), 5: {C}, 6: {S, D, E}, 7: {P}}
DIRTY = {0: {D}, 6: {P}, 5: set()}
FAST_TEXT = ": a fastText file, in which labels and text cannot be told apart; export JSONL"
COMMA = ": label '准予,离婚' has a comma, tab or line break; rename it"
NO_TEXT = ": task 301: no text in field data or text; name the right one with --text_field: content"
TWO_CHOICES = ": choices in topic, court; name one or more with --label_field\n"
SPANS = ':1: label [0, 2, "人名"] is no name; export text classification, not spans'


def of(answers):
    return [(TEXT[i], names) for i, names in answers.items()]


def untouched(answers):
    return [(text, answers.get(i, set())) for i, text in enumerate(TEXT)]


PERSONS = [(f"张三离婚{i}。", names) for i, names in enumerate([{P}, {P, C}, set(), set()])]
# What a file gives: samples, or the message after its name. The first pattern that fits counts.
EXPECTED = {
    "doccano-*-comma_label-*": COMMA.replace(":", ":1:", 1),
    "doccano-*-dirty-*": of(DIRTY),
    "doccano-*-shared-all-JSON*": SHARED,
    "doccano-*-shared-confirmed_only-JSON*": SHARED[:6],
    "doccano-*-fastText.all.txt": FAST_TEXT,
    "doccano-1.8.4-own-all-*.admin.jsonl": ": no text has a label; annotate and export again\n",
    "doccano-1.8.4-own-all-*.anno1.jsonl": untouched(ANNO1),
    "doccano-1.8.4-own-all-*.anno2.jsonl": untouched(ANNO2),
    "doccano-1.8.4-own-confirmed_only-*.admin.jsonl": ": empty, no record in it; ",
    "doccano-1.8.4-own-confirmed_only-*.anno1.jsonl": of(dict(sorted({**ANNO1, 2: set()}.items()))),
    "doccano-*-own-*.anno1.jsonl": of(ANNO1),
    "doccano-*-own-*.anno2.jsonl": of(ANNO2),
    "doccano-*-own-*.unknown.jsonl": ": no text has a label; annotate and export again\n",
    "doccano-*-predictions_as_metadata-*": [(TEXT[0], set()), (TEXT[6], {P})],
    "doccano-1.8.4-intent-*": [("张三离婚。", {P})],
    "doccano-1.8.4-metadata_named_data-*": [("2019-01-01", {"甲"}), ("2019-01-02", {"乙"})],
    "doccano-1.8.4-spans-*": SPANS,
    "form-completions.json": [
        *zip(["客服态度很差。", "价格实惠。"], [{"服务"}, {"价格", "物流"}]),
        *zip(["物流太慢了。", "包装很好。"], [{"服务"}, {"价格", "物流"}]),
    ],
    "form-doccano_annotations.jsonl": [
        *zip(["客服态度很差。", "价格实惠。"], [{"负面", "服务"}, {"正面"}])
    ],
    "form-single_object.json": [("客服态度很差。1", {"服务"})],
    "form-storage_annotations.jsonl": [
        *zip(["客服态度很差。", "价格实惠。"], [{"价格", "物流"}, {"服务"}]),
        *zip(["物流太慢了。", "包装很好。"], [{"价格", "物流"}, {"服务"}]),
    ],
    "form-taxonomy_min.json": [
        *zip(["客服态度很差。", "价格实惠。"], [{"服务", "态度"}, {"价格"}])
    ],
    "labelstudio-*-choices-*-JSON.json": of(CHOICES),
    # JSON-MIN does not say which annotation a reviewer marked as the truth.
    "labelstudio-*-choices-*-JSON_MIN.json": of({i: n for i, n in CHOICES.items() if i != 5}),
    "labelstudio-*-comma_label-*": COMMA.replace(":", ": task 304:", 1),
    "labelstudio-*-dirty-*": of(DIRTY),
    "labelstudio-*-labels_and_choices-*": PERSONS,
    "labelstudio-*-labels_and_single_choices-*": [PERSONS[0], ("张三离婚1。", {C}), *PERSONS[2:]],
    "labelstudio-*-other_text_field-*": NO_TEXT,
    "labelstudio-*-predictions_as_data-*": of({5: {P}, 6: {C}, 7: {S}}),
    "labelstudio-*-single-*": of({5: {P}, 6: {C}, 7: {S}}),
    "labelstudio-*-taxonomy-*": of({5: {"房产"}, 6: {"房产", "子女"}}),
    "labelstudio-*-two_choices-*": TWO_CHOICES,
}


def expected_of(name):
    return next((p for p in EXPECTED if fnmatch.fnmatchcase(name, p)), None)


def converted(path):
    return [(text, set(names)) for text, names in samples_of(path)]


@pytest.fixture
def convert_cases(tmp_path, run_cli):
    """convert_cases(names, *flags) converts files of CASES into one file; (status, stderr)."""

    def convert_cases(names, *flags):
        argv = ["--doccano_file", *(CASES / name for name in names), "--save_dir", tmp_path / "out"]
        argv += ["--splits", "1", "--is_shuffle", "False"]
        status, error = run_cli(doccano.main, [*argv, *flags])
        return status, error.replace(f"{CASES}/", "")

    return convert_cases


@pytest.mark.parametrize("name", sorted(os.listdir(CASES)))
def test_export_of_a_real_tool(convert_cases, tmp_path, name):
    flags, result = [], "train.txt"
    if "dirty" in name:
        (tmp_path / "names.txt").write_text(f"{D}\n{E}\n{P}\n", "utf-8")
        flags, result = ["--dirty", "--label_file", tmp_path / "names.txt"], "train_dirty.txt"
    status, error = convert_cases([name], *flags)
    expected = EXPECTED[expected_of(name)]
    if isinstance(expected, str):
        assert status == 2 and error.startswith(f"error: {name}{expected}") and error[-1] == "\n"
        assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()
    else:
        assert status == 0, error
        assert converted(tmp_path / "out" / result) == expected


def test_every_expectation_has_a_file():
    assert {expected_of(name) for name in os.listdir(CASES)} == set(EXPECTED)


APPROVED_ONLY = (
    'If nobody has looked at them, tick "Export only approved documents" in doccano\'s export.'
)


def case(name, form="JSON"):
    return f"labelstudio-1.23.2-{name}-annotated-{form}.json"


def own(kind, *members):
    return [f"doccano-1.8.4-own-{kind}-JSONL.{member}.jsonl" for member in members]


@pytest.mark.parametrize("members", [["anno1", "anno2"], ["admin", "anno1", "anno2"]])
@pytest.mark.parametrize("concatenated", [False, True])
def test_texts_that_a_member_never_saw_are_no_votes(
    convert, convert_cases, tmp_path, members, concatenated
):
    """doccano 1.8's default export has all texts in every member's file."""
    names = own("all", *members)
    if concatenated:
        status, error = convert("".join((CASES / name).read_text("utf-8") for name in names))
        source = tmp_path / "export.any"
    else:
        status, error = convert_cases(names)
        source = f"{names[0]} and {len(names) - 1} more"
    mixed = 4 + 2 * (len(members) > 2)
    assert status == 2 and error == (
        f"error: {source}: {mixed} of 6 texts have labels from one member and an empty list from "
        'another, who may not have seen them; tick "Export only approved documents" and export '
        "again, or delete the records that are no answer\n"
    )
    assert not (tmp_path / "out").exists()


def test_files_of_members_with_approved_texts(convert_cases, tmp_path):
    status, error = convert_cases(own("confirmed_only", "admin", "anno1", "anno2"))
    assert status == 0
    assert converted(tmp_path / "out" / "train.txt") == of(
        {0: {P}, 1: {C}, 2: set(), 3: {D}, 5: {P}, 6: {C}}
    )
    assert f"WARNING] - {own('confirmed_only', 'admin')[0]} is empty: no record in it." in error
    message = "1 texts have an empty list of labels and count as samples without labels."
    assert f"WARNING] - {message} {APPROVED_ONLY}" in error


def test_an_empty_list_of_an_approved_text_is_a_vote(convert, tmp_path):
    """As long as it is no rule that one member has labels and the other none."""
    votes = [([], ["甲"], ["甲"]), ([], [], ["甲"]), (["乙"], ["乙"]), (["乙"], ["甲", "乙"])]
    records = [
        {"id": n, "text": f"文{n}", "label": names}
        for n, given in enumerate(votes)
        for names in given
    ]
    status, error = convert(records, "--is_shuffle", "False")
    assert status == 0, error
    assert samples_of(tmp_path / "out" / "train.txt") == [
        *zip(["文0", "文2", "文3"], [["甲"], ["乙"], ["乙"]])
    ]
    assert convert([*records[:6], *records[8:]])[0] == 2  # now two of three


def test_untouched_texts_of_a_shared_project_are_counted(convert_cases):
    name = "doccano-1.8.4-shared-all-JSONL.all.jsonl"
    status, error = convert_cases([name])
    message = "2 texts have an empty list of labels and count as samples without labels."
    assert status == 0 and f"WARNING] - {message} {APPROVED_ONLY}\n" in error
    status, error = convert_cases([name], "--overwrite", "--skip_unlabeled")
    assert status == 0 and "empty list" not in error and "2 samples have no label: left" in error
    status, error = convert_cases([name.replace("all-", "confirmed_only-", 1)], "--overwrite")
    assert status == 0 and "empty list" not in error
    status, error = convert_cases([case("labels_and_choices")], "--overwrite")
    assert status == 0 and "empty list" not in error  # these were submitted without labels


def test_tasks_that_nobody_annotated(convert_cases):
    for form, number in (("JSON", 4), ("JSON_MIN", 3)):  # JSON-MIN lacks the cancelled one
        name = f"labelstudio-1.23.2-choices-snapshot-{form}.json"
        status, error = convert_cases([name], "--overwrite")
        assert status == 0 and f"INFO] - Left out {number} tasks without annotation." in error


def test_empty_text_without_annotation_is_no_fault(convert, tmp_path):
    tasks = [task("文", annotation(["甲"])), task("", number=2), task(None, number=3)]
    records = [{"id": 4, "text": "  ", "label": []}, {"id": 5, "text": "字", "label": ["乙"]}]
    status, error = convert(json.dumps([*tasks, *records]), "--is_shuffle", "False")
    assert status == 0 and "INFO] - Left out 3 tasks without annotation." in error
    assert samples_of(tmp_path / "out" / "train.txt") == [("文", ["甲"]), ("字", ["乙"])]


@pytest.mark.parametrize("form", ["JSON", "JSON_MIN"])
def test_two_choices_can_be_joined(convert_cases, tmp_path, form):
    name = case("two_choices", form)
    assert convert_cases([name], "--label_field", "topic", "court")[0] == 0
    joined = of({5: {P}, 6: {P, C, E}, 7: {P, E}})
    assert converted(tmp_path / "out" / "train.txt") == joined
    assert convert_cases([name], "--label_field", "court", "--overwrite")[0] == 0
    assert converted(tmp_path / "out" / "train.txt") == of({5: set(), 6: {E}, 7: {E}})
    status, error = convert_cases([name], "--label_field", "court", "title", "--overwrite")
    message = "no field title among the annotations, only topic, court; correct --label_field\n"
    assert status == 2 and error.endswith(f"{name}: {message}")


@pytest.mark.parametrize("form", ["JSON", "JSON_MIN"])
def test_text_in_another_field_of_the_task(convert_cases, tmp_path, form):
    name = case("other_text_field", form)
    status, error = convert_cases([name], "--text_field", "content")
    assert status == 0, error
    assert converted(tmp_path / "out" / "train.txt") == of({5: {P, C}, 6: {C, S}, 7: {S, D}})
    status, error = convert_cases([name], "--overwrite")
    assert error.endswith("name the right one with --text_field: content, title, case_id\n")


@pytest.mark.parametrize("form", ["JSON", "JSON_MIN"])
def test_paths_of_a_taxonomy(convert_cases, convert, tmp_path, form):
    assert convert_cases([case("taxonomy", form)], "--separator", "/")[0] == 0
    assert converted(tmp_path / "out" / "train.txt") == of(
        {5: {"财产/房产"}, 6: {"财产/房产", "子女"}}
    )
    paths = [["服务", "其他"], ["价格", "其他"]]
    record = {"text": "文", "id": 1, "tax": [{"taxonomy": paths}], "annotator": 1}
    status, error = convert(json.dumps([record]), "--overwrite")
    message = (
        "Label 其他 is the end of 2 paths (价格/其他, 服务/其他); --separator / keeps them apart."
    )
    assert status == 0 and f"WARNING] - {message}" in error
    assert samples_of(tmp_path / "out" / "train.txt") == [("文", ["其他"])]
    status, error = convert(json.dumps([record]), "--overwrite", "--separator", ">")
    assert status == 0 and "keeps them apart" not in error
    assert samples_of(tmp_path / "out" / "train.txt") == [("文", ["服务>其他", "价格>其他"])]


def json_min(data, annotation, annotation_id=7):
    """A record as Label Studio writes it: the data, the id, the controls, and about both."""
    after = {"annotator": 1, "annotation_id": annotation_id, "created_at": "x", "lead_time": None}
    return {**data, "id": 3, **annotation, **after}


SINGLE = json_min({"text": "文", "labels": ["旧"]}, {"要素": "甲"})
SPAN = [{"start": 0, "end": 1, "text": "文", "labels": ["人名"]}]


@pytest.mark.parametrize(
    "records, flags, samples",
    [
        ([SINGLE], [], [["甲"]]),
        ([SINGLE, json_min({"text": "字", "labels": ["旧"]}, {})], [], [["甲"], []]),
        ([SINGLE, json_min({"text": "字", "labels": ["旧"]}, {}, None)], [], [["甲"]]),
        ([json_min({"text": "文"}, {"label": SPAN, "要素": "甲"})], [], [["甲"]]),
        ([json_min({"content": "文"}, {"要素": "甲"})], [], [["甲"]]),
        ([{"id": 3, **SINGLE}], ["--label_field", "要素"], [["甲"]]),
        ([dict(sorted(SINGLE.items()))], ["--label_field", "要素"], [["甲"]]),
        (
            [json_min({"text": "文"}, {"要素": "甲", "note": "可疑"})],
            ["--label_field", "要素"],
            [["甲"]],
        ),
        (
            [
                json_min({"text": "文"}, {"要素": "甲", "note": {"text": ["a", "b"]}}),
                json_min({"text": "字"}, {"要素": "乙", "note": "a"}),
            ],
            [],
            [["甲"], ["乙"]],
        ),
    ],
    ids=[
        "imported labels",
        "submitted without choice",
        "nobody",
        "spans called label",
        "text in another field",
        "id in the data",
        "keys sorted",
        "text box",
        "text box with two texts",
    ],
)
def test_annotations_and_data_of_json_min(convert, tmp_path, records, flags, samples):
    status, error = convert(json.dumps(records), *flags, "--is_shuffle", "False")
    assert status == 0, error
    assert [names for _, names in samples_of(tmp_path / "out" / "train.txt")] == samples


APART = "export JSON, where annotations and data are apart"


@pytest.mark.parametrize(
    "records, flags, message",
    [
        (
            [SINGLE],
            ["labels"],
            ": no field labels among the annotations, only 要素; correct --label",
        ),
        (
            [{"id": 3, **SINGLE}],
            [],
            ": choices in labels, 要素; name one or more with --label_field",
        ),
        ([dict(sorted(SINGLE.items()))], [], ": choices in labels, 要素; name one or more with -"),
        (
            [json_min({"text": "文"}, {"要素": "甲", "note": "可疑"})],
            [],
            ": choices in 要素, note; name one or more with --label_field",
        ),
        (
            [json_min({"text": "文", "要素": "甲"}, {})],
            [],
            f": no annotation between id and annotator; {APART}",
        ),
        (
            [json_min({"text": "文"}, {"要素": "甲"}), json_min({"text": "字", "要素": "乙"}, {})],
            [],
            ": task 3: field 要素 of the data is called like the annotation; export JSON, where",
        ),
        (
            [json_min({"text": "文"}, {"label": SPAN})],
            [],
            ": no choices in label; label whole texts with <Choices> or <Taxonomy>",
        ),
        (
            [json_min({"text": "文"}, {"label": SPAN})],
            ["label"],
            ": task 3: label holds no choices; export text classification, not spans",
        ),
        (
            [json_min({"text": "文"}, {}, None)],
            [],
            ": nobody has annotated a text; annotate, then export again",
        ),
    ],
    ids=[
        "imported labels",
        "id in the data",
        "keys sorted",
        "text box",
        "data in place of the annotation",
        "data of one task",
        "spans only",
        "spans",
        "nobody",
    ],
)
def test_what_json_min_does_not_tell(convert, tmp_path, records, flags, message):
    status, error = convert(json.dumps(records), *(["--label_field", *flags] if flags else []))
    assert status == 2 and error.startswith(f"error: {tmp_path / 'export.any'}{message}"), error
    assert len(error.splitlines()) == 1


STORED = {
    "id": 9,
    "result": annotation(["甲"])["result"],
    "task": {"id": 1, "data": {"text": "文"}},
}


def old_doccano(*annotations, **more):
    return {"id": 1, "text": "文", "annotations": list(annotations), **more}


@pytest.mark.parametrize(
    "content, samples",
    [
        ([STORED, {**STORED, "result": [], "was_cancelled": True}], [["甲"]]),
        (
            [
                STORED,
                STORED,
                {**STORED, "result": annotation(["乙"])["result"], "ground_truth": True},
            ],
            [["乙"]],
        ),
        (json.dumps(STORED, indent=1) + json.dumps(STORED, indent=1), [["甲"]]),
        (json.dumps([task("文", annotation(["甲"]))]) * 2, [["甲"]]),
        ("\ufeff" + GOOD + "\ufeff" + GOOD.replace("甲", "乙").replace("1", "2"), [["甲"], ["乙"]]),
        (
            [old_doccano({"label_name": "甲", "user": 1}, {"label_name": "乙", "user": 1})],
            [["甲", "乙"]],
        ),
        (
            [old_doccano({"label_name": "甲", "user": 1}, {"label_name": "甲", "user": 2})],
            [["甲"]],
        ),
        (
            [
                old_doccano({"label_name": "甲", "user": 1}),
                {**old_doccano(annotation_approver="b"), "id": 2},
                {**old_doccano(annotation_approver=None), "id": 3},
            ],
            [["甲"], []],
        ),
    ],
    ids=[
        "storage, cancelled",
        "storage, truth",
        "objects over lines",
        "arrays",
        "marks between files",
        "doccano 1.2",
        "doccano 1.2, users",
        "doccano 1.2, approved",
    ],
)
def test_rare_forms(convert, tmp_path, content, samples):
    status, error = convert(content, "--is_shuffle", "False")
    assert status == 0, error
    assert [names for _, names in samples_of(tmp_path / "out" / "train.txt")] == samples


CSV = "id,data,label\n" + '1,"文",甲\n' * 20


@pytest.mark.parametrize(
    "content, message",
    [
        (CSV, ":1: not JSON; export JSONL from doccano or JSON from Label Studio"),
        ("\n" + CSV, ":2: not JSON; export JSONL from doccano or JSON from Label Studio"),
        ("{'data': 'x'}\n" * 20, ":1: not JSON (Expecting property name enclosed in double quotes"),
        ('{\n "id": 1\n "data": 2\n}', ":3: not JSON (Expecting ',' delimiter); export again"),
        ('[{"id": 1}', ":1: not JSON (Expecting ',' delimiter); export again"),
        ("[" * 100_000, ":1: not JSON (maximum recursion depth exceeded"),
        (
            [{**STORED, "task": 5}],
            ":1: an annotation without its task's data; export JSON from Label Studio",
        ),
        (
            json.dumps([{"id": 1, "data": {"text": "文"}, "annotations": [143]}]),
            ": task 1: annotations are numbers; export JSON with the annotations themselves",
        ),
        (
            [old_doccano({"label": 1, "user": 1})],
            ":1: annotations hold label numbers; export with text labels from doccano",
        ),
        (
            [old_doccano({"label": 1, "user": 1, "start_offset": 0, "end_offset": 1})],
            ':1: label {"label": 1, "user": 1, "start_offset":  is no name; export text',
        ),
    ],
    ids=[
        "CSV",
        "CSV after a blank line",
        "Python",
        "object",
        "cut off",
        "nested",
        "storage without data",
        "numbers of annotations",
        "doccano 1.0 numbers",
        "doccano 1.0 spans",
    ],
)
def test_each_foreign_form_has_one_message(convert, tmp_path, content, message):
    status, error = convert(content)
    assert status == 2 and error.startswith(f"error: {tmp_path / 'export.any'}{message}"), error
    assert len(error.splitlines()) == 1


def test_zip_of_doccano(convert, tmp_path):
    names = own("confirmed_only", "admin", "anno1", "anno2")
    contents = {name.split(".")[-2]: (CASES / name).read_bytes() for name in names}
    status, error = convert(as_zip(**contents), "--is_shuffle", "False")
    assert status == 0 and f"{tmp_path / 'export.any'}/admin.jsonl is empty" in error
    expected = of({0: {P}, 1: {C}, 2: set(), 3: {D}, 5: {P}, 6: {C}})
    assert converted(tmp_path / "out" / "train.txt") == expected
    status, error = convert(as_zip(anno1=GOOD, anno2=GOOD + "{}"), "--overwrite")
    where = f"{tmp_path / 'export.any'}/anno2.jsonl:2"
    assert status == 0 and "Left out 1 tasks without annotation" in error
    status, error = convert(as_zip(anno1=GOOD, anno2=GOOD + '{"label": ["甲"]}'), "--overwrite")
    assert status == 2 and error.startswith(f"error: {where}: no text in field data or text; ")
    damaged = bytearray(as_zip(anno1=GOOD * 50))
    damaged[120] ^= 0xFF
    status, error = convert(bytes(damaged), "--overwrite")
    assert status == 2 and error.endswith("; unpack it and give the files\n"), error


def test_only_a_piece_of_the_file_is_in_memory():
    """Label Studio writes all tasks on one line."""
    tasks = json.dumps([task(f"文本{i}" * 20, annotation(["甲"]), number=i) for i in range(20_000)])
    file = io.BytesIO(tasks.encode())
    tracemalloc.start()
    count = sum(1 for _ in exports.json_records("x", file, []))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 10 * exports.PIECE < len(tasks)


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


@pytest.mark.parametrize(
    "content, message",
    [
        ("", EMPTY),
        ("\ufeff \n", EMPTY),
        ("[]", EMPTY),
        ("[1]", ": record 1: 1 is no record with a text and labels; export JSONL from doccano"),
        ('[{"id": 1,\n "data": }]', ":2: not JSON (Expecting value); export again"),
        (b'[{"data": "\xff"}]', ":1: not valid UTF-8 (byte 0xff); save the file as UTF-8"),
        (GOOD.encode() + b'{"data": "\xff"}', ":2: not valid UTF-8 (byte 0xff); save"),
        (b"PK\x03\x04rest", ": File is not a zip file; unpack it and give the files"),
        ('{"data": "x", "label": []}', ": no text has a label; annotate and export again"),
        ('{"data": "x"}', f": {NO_LABELS}; export the labels, too"),
        (json.dumps([task("文")]), ": nobody has annotated a text; annotate, then export again"),
        (json.dumps([task("", annotation(["甲"]), number=9)]), ": task 9: empty text; delete"),
        (json.dumps([{"text": "", "label": ["甲"]}]), ": record 1: empty text; delete"),
    ],
    ids=[
        "empty file",
        "blank file",
        "empty array",
        "array of a number",
        "array not JSON",
        "array not UTF-8",
        "lines not UTF-8",
        "zip",
        "no label at all",
        "no label field",
        "no annotation",
        "task",
        "record",
    ],
)
def test_faulty_export(convert, tmp_path, content, message):
    status, error = convert(content)
    assert status == 2 and len(error.splitlines()) == 1, error
    assert error.startswith(f"error: {tmp_path / 'export.any'}{message}")
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
