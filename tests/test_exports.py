"""data/exports.py: every form of an export, exports of the real tools, what is refused."""

import fnmatch
import io
import json
import os
import tracemalloc
from pathlib import Path

import doccano
import exports
import pytest
from export_forms import GOOD, annotation, as_zip, samples_of, task

NO_LABELS = "no labels in field label, labels, cats, choice or choices"
EMPTY = ": empty, no record in it; annotate or approve texts, then export again\n"

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
def test_each_foreign_form_has_one_message(convert, tmp_path, content, message):
    status, error = convert(content)
    assert status == 2 and error.startswith(f"error: {tmp_path / 'export.any'}{message}"), error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


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
