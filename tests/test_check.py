"""data/check.py: what it says of good and of broken data, in the report, its JSON and its plots."""

import json
import os
import struct
import subprocess
import sys
import warnings

import check
import matplotlib.font_manager
import pytest
from conftest import SAMPLE, needs_package

import utils

PLOTS = {"labels.png", "samples.png", "co_occurrence.png"}
LABELS = ["离婚", "财产", "债务"]
TRAIN = [
    "一二三四\t离婚",
    "五六\t离婚,财产",
    "",
    "一二三四\t财产",
    "五六\t财产,离婚",
    "七\t",
    "八九十\t离婚,财产,债务",
]
DEV = ["五六\t离婚,财产", "七\t离婚", "十一\t财产"]


@pytest.fixture
def folder(tmp_path):
    """A small data folder; label 债务 has no dev example."""
    path = tmp_path / "data"
    path.mkdir()
    for name, lines in (("label", LABELS), ("train", TRAIN), ("dev", DEV)):
        (path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def pipe_with(content):
    """The path of a pipe that gives the content (up to 64 KiB) once."""
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    return f"/dev/fd/{reader}"


@pytest.fixture
def run(tmp_path, capfd):
    """run(folder, *flags) returns (exit status, stdout, stderr, report.json)."""

    def run(folder, *flags):
        capfd.readouterr()
        argv = ["--dataset_dir", folder, "--output_dir", tmp_path / "out", *flags]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Glyph")  # "missing from font"
                utils.cli(lambda: check.main([str(a) for a in argv]))
            status = 0
        except SystemExit as stop:
            status = stop.code
        report = tmp_path / "out" / "report.json"
        report = json.loads(report.read_text("utf-8")) if report.exists() else None
        return status, *capfd.readouterr(), report

    return run


def test_report_of_a_small_folder(run, folder, tmp_path):
    status, out, error, _ = run(folder, "--max_seq_length", "4", "5")
    assert status == 0 and f"Report and plots saved in {tmp_path / 'out'}" in error
    assert (
        out
        == f"""\
train: 6 samples in {folder / "train.txt"}
  malformed lines: 0, blank lines: 1
  empty texts: 0
  samples without labels: 1 (16.7%)
  samples by number of labels: 0: 1, 1: 2, 2: 2, 3: 1 (mean 1.500)
  length in characters + 2: mean 4.7, median 4.5, p95 6, p99 6, max 6
  cut at max_seq_length: 4: 3 (50.0%), 5: 2 (33.3%)
  duplicate texts: 2 (1 with conflicting labels)
    lines 1, 4 (conflicting labels)
    lines 2, 5
dev: 3 samples in {folder / "dev.txt"}
  malformed lines: 0, blank lines: 0
  empty texts: 0
  samples without labels: 0 (0.0%)
  samples by number of labels: 1: 2, 2: 1 (mean 1.333)
  length in characters + 2: mean 3.7, median 4, p95 4, p99 4, max 4
  cut at max_seq_length: 4: 0 (0.0%), 5: 0 (0.0%)
  duplicate texts: 0 (0 with conflicting labels)
texts of dev that are also in train: 2 (1 with conflicting labels)
    dev 1 = train 2, 5
    dev 2 = train 6 (conflicting labels)
  id           train             dev  label
   0       4 (66.7%)       2 (66.7%)  离婚
   1       4 (66.7%)       2 (66.7%)  财产
   2       1 (16.7%)        0 (0.0%)  债务
labels missing from train: none
labels missing from dev: 债务
labels that occur together in train:
    3: 离婚 + 财产
    1: 离婚 + 债务
    1: 财产 + 债务
"""
    )


def test_json_of_a_small_folder(run, folder, tmp_path):
    *_, report = run(folder, "--max_seq_length", "4")
    assert report["files"]["train"] == {
        "path": str(folder / "train.txt"),
        "samples": 6,
        "blank_lines": 1,
        "malformed": [],
        "empty_texts": [],
        "carriage_returns": [],
        "csv_quoted": [],
        "unlabelled": 1,
        "labels_per_sample": {"0": 1, "1": 2, "2": 2, "3": 1},
        "duplicates": [
            {"lines": [1, 4], "same_labels": False, "text": "一二三四"},
            {"lines": [2, 5], "same_labels": True, "text": "五六"},
        ],
        "word_share": 0.0,
        "length": {"mean": 28 / 6, "median": 4.5, "p95": 6.0, "p99": 6.0, "max": 6.0},
        "longer_than": {"4": 3},
    }
    assert report["length_unit"] == "characters + 2"
    assert report["labels"][2] == {"id": 2, "label": "债务", "train": 1, "dev": 0}
    assert report["absent"] == {"train": [], "dev": ["债务"]}
    assert report["shared_with_train"]["dev"] == [
        {"train_lines": [2, 5], "lines": [1], "same_labels": True, "text": "五六"},
        {"train_lines": [6], "lines": [2], "same_labels": False, "text": "七"},
    ]
    assert report["co_occurrence"] == [
        {"ids": [0, 1], "labels": ["离婚", "财产"], "train": 3},
        {"ids": [0, 2], "labels": ["离婚", "债务"], "train": 1},
        {"ids": [1, 2], "labels": ["财产", "债务"], "train": 1},
    ]
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"report.json", *PLOTS}
    assert all(written[name].startswith(b"\x89PNG") for name in PLOTS)


def test_without_output_folder_nothing_is_written(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check.main(["--dataset_dir", "data"])
    assert capsys.readouterr().out.startswith("train: 6 samples in data/train.txt\n")
    assert os.listdir(tmp_path) == ["data"]
    assert sorted(os.listdir(folder)) == ["dev.txt", "label.txt", "train.txt"]


def test_test_set_is_read_where_there_is_one(run, folder):
    assert "test" not in run(folder)[3]["files"]
    (folder / "test.txt").write_text("五六\t债务\n新\t债务\n", encoding="utf-8")
    status, out, _, report = run(folder)
    assert status == 0 and report["files"]["test"]["samples"] == 2
    assert [group["lines"] for group in report["shared_with_train"]["test"]] == [[1]]
    assert "labels missing from test: 离婚, 财产\n" in out
    (folder / "test.txt").rename(folder / "other.txt")
    assert run(folder, "--test_file", "other.txt")[3]["files"]["test"]["samples"] == 2


# ----------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("count", [1, 25])
def test_all_faults_are_listed_and_the_report_is_given(run, folder, tmp_path, count):
    with open(folder / "train.txt", "ab") as file:
        for i in range(count):
            file.write(["没有制表符", "甲\t债\n", "a\tb\t离婚\n", "乱\t"][i % 4].encode())
            file.write(b"\n" if i % 4 == 0 else b"\xff\n" if i % 4 == 3 else b"")
    with open(folder / "dev.txt", "a", encoding="utf-8") as file:
        file.write("没有制表符\n")
    status, out, error, report = run(folder)
    assert status == 2
    reason = f"{count + 1} problem(s), listed at the end of the report"
    assert error.splitlines()[-1] == f"error: train.py rejects this data: {reason}"
    lines = out.splitlines()[-count - 1 :]
    number = [int(line.split(":")[1]) for line in lines]
    assert number == [*range(8, 8 + count), 4]
    kinds = ["no tab", "unknown label '债'", "2 tabs", "not valid UTF-8"]
    for i, line in enumerate(lines[:-1]):
        assert line.startswith(f"{folder / 'train.txt'}:{8 + i}: {kinds[i % 4]}")
    assert report["files"]["train"]["malformed"] + report["files"]["dev"]["malformed"] == lines
    assert report["files"]["train"]["samples"] == 6  # the good lines
    assert set(os.listdir(tmp_path / "out")) == {"report.json", *PLOTS}


@pytest.mark.parametrize("content", ["", "\n \n", "kein Tab\n"], ids=["empty", "blank", "no tab"])
@pytest.mark.parametrize("name", ["train.txt", "dev.txt"])
def test_file_without_samples(run, folder, name, content):
    (folder / name).write_text(content)
    status, out, error, report = run(folder)
    assert status == 2 and error.endswith("report\n") and "1 problem(s)" in error
    assert report["files"][name[:-4]]["samples"] == 0 and report["files"][name[:-4]]["length"] == {}
    assert out.splitlines()[-1].startswith(f"{folder / name}:")


def test_no_samples_at_all(run, folder):
    for name in ("train.txt", "dev.txt"):
        (folder / name).write_text("\n")
    status, _, error, report = run(folder)
    assert status == 2 and "2 problem(s)" in error and "Traceback" not in error
    assert report["files"]["train"]["labels_per_sample"] == {}


def test_inputs_are_not_replaced(folder, run_cli):
    """The folder's own files may be named like the results."""
    (folder / "label.txt").rename(folder / "report.json")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    argv = ["--dataset_dir", folder, "--label_file", "report.json", "--output_dir", folder]
    status, error = run_cli(check.main, argv)
    assert status == 2 and f"cannot write {folder / 'report.json'}: it is an input" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_are_read_once(run, folder):
    """Each input may be a pipe; a line ends at a line feed alone."""
    train = "".join(f"文本{i}\r\u2028第二行\x85\x0b第三行\t离婚\n" for i in range(600))
    dev = "".join(f"{line}\n" for line in DEV)
    labels = "".join(f"{label}\n" for label in LABELS)
    flags = ["--train_file", pipe_with(train), "--dev_file", pipe_with(dev)]
    flags += ["--label_file", pipe_with(labels), "--test_file", pipe_with(dev)]
    status, _, error, report = run(folder, *flags)
    assert status == 0, error
    files = report["files"]
    assert [files[name]["samples"] for name in ("train", "dev", "test")] == [600, 3, 3]


def accepts(read, path):
    try:
        read(path, LABELS)
    except utils.UserError:
        return False
    return True


@pytest.mark.parametrize(
    "line", ["甲\t离婚", "甲\t", "\t离婚", "", "甲", "甲\t离婚，财产", "甲\t离婚,", "甲\t\t离婚"]
)
def test_status_agrees_with_the_reader_of_train(run, folder, line):
    with open(folder / "train.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    status, *_ = run(folder)
    assert (status == 0) == accepts(utils.read_examples, folder / "train.txt")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_dir", "none"], "none/label.txt: No such file or directory; check the path"),
        (["--train_file", "none.txt"], "none.txt: No such file or directory; check the path"),
        (["--dev_file", "none.txt"], "none.txt: No such file or directory; check the path"),
        (["--test_file", "none.txt"], "none.txt: No such file or directory; check the path"),
        (["--model_name", "ernie-3.0-nano-zh"], "ernie-3.0-nano-zh: no such folder; give one with"),
        (["--model_name", "none", "--params_path", "none"], "not allowed with argument"),
        (["--params_path", "none"], "none/vocab.txt: No such file or directory; check the path"),
        (["--max_seq_length", "2"], "2 is not a number of at least 3"),
        (["--label_file", "train.txt"], "train.txt:1: label '一二三四\t离婚' has a comma or tab"),
        (["--output_dir", SAMPLE / "label.txt"], "label.txt: File exists"),
    ],
)
def test_bad_arguments(run, folder, tmp_path, flags, message):
    status, out, error, _ = run(folder, *flags)
    assert status == 2 and out == "" and message in error and "Traceback" not in error
    assert os.listdir(tmp_path) == ["data"]


# ---------------------------------------------------------------------------------------- lengths
def test_tokens_are_counted_with_a_model(run, folder, tiny_model):
    """The share that is cut is the one of which train.py warns."""
    (folder / "dev.txt").write_text("原告与被告离婚abc123\t离婚\n原告\t\n", encoding="utf-8")
    *_, report = run(folder, "--params_path", tiny_model, "--max_seq_length", "5", "8")
    tokenizer, found = utils.load_tokenizer(tiny_model), report["files"]["dev"]
    texts = ["原告与被告离婚abc123", "原告"]
    lengths = [len(ids) for ids in utils.encode(texts, tokenizer, 512)[0]]
    assert lengths[0] not in (9, len(texts[0]) + 2) and lengths[1] == 4
    assert report["length_unit"] == "tokens" and found["length"]["max"] == lengths[0]
    for size in (5, 8):
        assert found["longer_than"][str(size)] == utils.encode(texts, tokenizer, size)[1]


# ------------------------------------------------------------------------------------------ plots
@pytest.fixture
def only_default_fonts(monkeypatch):
    """As on a machine without a Chinese font."""
    manager = matplotlib.font_manager.fontManager
    fonts = [entry for entry in manager.ttflist if "DejaVu" in entry.name]
    monkeypatch.setattr(manager, "ttflist", fonts)
    return fonts


def install_boxes(path, characters, fonts):
    """A font of boxes for these characters, as if it were installed."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    codes = {ord(c): f"uni{ord(c):04X}" for c in sorted(set(characters))}
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((900, 0), (900, 800), (100, 800)):
        pen.lineTo(point)
    pen.closePath()
    names, glyph = [".notdef", *codes.values()], pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(codes)
    builder.setupGlyf({name: glyph for name in names})
    builder.setupHorizontalMetrics({name: (1000, 100) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    entry = matplotlib.font_manager.FontEntry(fname=str(path), name="Boxes", weight=400)
    fonts.append(entry)


def test_names_in_plots_where_a_font_has_them(run, folder, tmp_path, only_default_fonts):
    install_boxes(tmp_path / "1.ttf", "".join(LABELS), only_default_fonts)  # no digits
    status, _, error, _ = run(folder)
    assert status == 0 and "No installed font" in error
    only_default_fonts.pop()
    install_boxes(tmp_path / "2.ttf", "".join(LABELS) + "lp 0123456789", only_default_fonts)
    status, _, error, _ = run(folder)
    assert status == 0 and "No installed font" not in error
    assert check.find_font("离婚").get_file() == str(tmp_path / "2.ttf")
    assert check.find_font("离婚吗") is None  # not all of them


def test_class_ids_in_plots_where_no_font_has_the_names(run, folder, only_default_fonts):
    status, _, error, _ = run(folder)
    assert status == 0 and "No installed font has all label names; the plots show class" in error
    assert "DejaVu" in check.find_font("plain names").get_file()


def test_tick_labels():
    from matplotlib.figure import Figure

    rows = [{"id": 7, "label": "a$b$"}, {"id": 3, "label": "c"}]
    for font, names in ((check.find_font("abc$"), ["7 a$b$", "3 c"]), (None, ["7", "3"])):
        axes = Figure().subplots()
        check.name_ticks(axes.yaxis, rows, font)
        ticks = axes.get_yticklabels()
        assert [tick.get_text() for tick in ticks] == names
        assert not any(tick.get_parse_math() for tick in ticks)  # $...$ is no formula


def test_many_labels(run, tmp_path):
    folder, count = tmp_path / "many", 300
    folder.mkdir()
    labels = [f"label {i}" for i in range(count)]
    (folder / "label.txt").write_text("\n".join(labels))
    for name in ("train", "dev"):
        lines = (f"{name} {i}\t{labels[i]},{labels[i // 2]}\n" for i in range(count))
        (folder / f"{name}.txt").write_text("".join(lines))
    status, out, error, report = run(folder)
    assert status == 0 and len(report["labels"]) == count and "No installed font" not in error
    assert len(report["co_occurrence"]) == count - 1 and "    ... and 289 more\n" in out
    for name in ("labels.png", "co_occurrence.png"):
        header = (tmp_path / "out" / name).read_bytes()[16:24]  # width and height
        assert max(struct.unpack(">2I", header)) <= 2100  # 60 of the labels


# ------------------------------------------------------------------------------------ whole sets
def test_the_sample(run):
    status, out, _, report = run(SAMPLE)
    assert status == 0
    expected = {"train": (2000, 60, 40), "dev": (400, 12, 11)}  # data/README.md
    for name, (samples, unlabelled, cut) in expected.items():
        facts = report["files"][name]
        found = facts["samples"], facts["unlabelled"], facts["longer_than"]["128"]
        assert found == (samples, unlabelled, cut)
        assert facts["malformed"] == facts["duplicates"] == []
    assert report["shared_with_train"] == {"dev": []} and report["absent"]["dev"] == []
    table = (SAMPLE / "README.md").read_text("utf-8")
    for row in report["labels"]:
        assert f"| {row['id']} | {row['label']} | {row['train']} | {row['dev']} |" in table


REAL_COUNTS = {
    "婚后有子女": (6759, 784),
    "限制行为能力子女抚养": (4358, 492),
    "有夫妻共同财产": (3322, 359),
    "支付抚养费": (1690, 199),
    "不动产分割": (1399, 166),
    "婚后分居": (1148, 137),
    "二次起诉离婚": (1054, 111),
    "按月给付抚养费": (1003, 117),
    "准予离婚": (988, 116),
    "有夫妻共同债务": (824, 95),
    "婚前个人财产": (345, 37),
    "法定离婚": (492, 57),
    "不履行家庭义务": (426, 50),
    "存在非婚生子": (289, 35),
    "适当帮助": (187, 12),
    "不履行离婚协议": (191, 22),
    "损害赔偿": (118, 12),
    "感情不和分居满二年": (160, 20),
    "子女随非抚养权人生活": (194, 26),
    "婚后个人财产": (185, 24),
}


def test_the_real_set(run, shared):
    status, out, _, report = run(shared / "data" / "divorce")
    assert status == 0
    train_facts, dev_facts = report["files"]["train"], report["files"]["dev"]
    for facts in (train_facts, dev_facts):
        assert facts["malformed"] == facts["duplicates"] == [] and facts["unlabelled"] == 0
    assert (train_facts["samples"], dev_facts["samples"]) == (14377, 1611)
    sizes = {"1": 7399, "2": 4539, "3": 1256, "4": 1062, "5": 90, "6": 28, "7": 3}
    assert train_facts["labels_per_sample"] == sizes
    sizes = {"1": 813, "2": 505, "3": 145, "4": 131, "5": 13, "6": 4}
    assert dev_facts["labels_per_sample"] == sizes
    assert "(mean 1.748)" in out and "(mean 1.782)" in out
    length = {name: round(value - 2, 1) for name, value in train_facts["length"].items()}
    assert length == {"mean": 56.2, "median": 48, "p95": 126, "p99": 193, "max": 615}
    assert (train_facts["longer_than"]["128"], dev_facts["longer_than"]["128"]) == (693, 63)
    assert len(report["shared_with_train"]["dev"]) == 34
    assert "texts of dev that are also in train: 34 (" in out
    found = {row["label"]: (row["train"], row["dev"]) for row in report["labels"]}
    assert found == REAL_COUNTS and list(found) == list(REAL_COUNTS)
    assert report["absent"] == {"train": [], "dev": []}


def test_empty_texts_are_listed(run, folder):
    with open(folder / "dev.txt", "a", encoding="utf-8") as file:
        file.write("\t离婚\n \t\n")
    status, out, _, report = run(folder)
    assert status == 0 and "  empty texts: 2\n    line 4\n    line 5\n" in out
    assert report["files"]["dev"]["empty_texts"] == [4, 5]


def test_a_terminal_without_chinese(folder):
    command = [sys.executable, check.__file__, "--dataset_dir", folder]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "\\u79bb\\u5a5a" in run.stdout, run.stderr


# ------------------------------------------------------------------------- legal but hardly meant
def test_carriage_returns_and_csv_quotes_are_counted(run, folder):
    """Some lines are as pandas' to_csv writes them, others have quotes as any text may."""
    lines = ['"原告称""感情破裂""，离婚。"\t离婚', '"""同意""被告说"\t离婚', "价值“80万”。\t财产"]
    lines += ['"同意"和"离婚"\t离婚', '"\t离婚', "甲\r乙\r丙\t离婚", "丁\r\t离婚"]
    (folder / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    status, out, _, report = run(folder)
    assert status == 0
    assert report["files"]["train"]["csv_quoted"] == [1, 2]
    assert report["files"]["train"]["carriage_returns"] == [6]  # one at the end is stripped
    assert "  texts with a carriage return (a space in results): 1\n    line 6\n" in out
    quoted = "  texts in CSV quotes, which are read as text (pandas: quoting=3): 2\n"
    assert f"{quoted}    line 1\n    line 2\n" in out and out.count("CSV") == 1


def test_what_pandas_writes_as_the_readme_says(run, folder):
    """to_csv with quotes that it doubles is counted; with quoting=3 the texts arrive unchanged."""
    needs_package("pandas")
    import pandas

    texts = ['原告称"感情破裂"', '"同意"，被告说', "无引号"]
    table = pandas.DataFrame({"text": texts, "label": ["离婚", "财产", "离婚,财产"]})
    settings = {"sep": "\t", "header": False, "index": False}
    table.to_csv(folder / "train.txt", **settings)
    assert run(folder)[3]["files"]["train"]["csv_quoted"] == [1, 2]
    table.to_csv(folder / "train.txt", **settings, quoting=3)
    assert run(folder)[3]["files"]["train"]["csv_quoted"] == []
    assert utils.read_examples(folder / "train.txt", LABELS) == (texts, [[0], [1], [0, 1]])


def test_characters_are_an_upper_bound_for_english(run, folder, tiny_model):
    (folder / "dev.txt").write_text("The parties were divorced in 2013.\t离婚\n", encoding="utf-8")
    note = (
        "    upper bounds: {}% of the characters are in words of letters, which are fewer tokens; "
    )
    note += "give --model_name FOLDER to count tokens\n"
    _, out, _, report = run(folder)
    lines = out.splitlines(keepends=True)
    assert lines.count(note.format(71)) == out.count("upper bounds") == 1  # dev, not train
    assert report["files"]["dev"]["word_share"] == 24 / 34 and report["length_unit"][:5] == "chara"
    _, out, _, report = run(folder, "--model_name", tiny_model)  # as the note says
    assert "upper bounds" not in out and report["length_unit"] == "tokens"
    (folder / "dev.txt").write_text("原告于2013年诉至法院，被告Ａ、B辩称OK。\t离婚\n", "utf-8")
    assert "upper bounds" not in run(folder)[1]


def test_look_alike_names_and_joined_files_are_said(run, folder):
    with open(folder / "train.txt", "a", encoding="utf-8") as file:
        file.write("\ufeff甲\t离婚\n乙\t离\u200b婚\n")
    status, out, error, _ = run(folder)
    assert status == 2 and error.count("removed 1 byte order mark(s)") == 1
    last = "it has U+200B ZERO WIDTH SPACE where the label name '离婚' has nothing; write both the "
    path = folder / "train.txt"
    assert out.endswith(f"{path}:9: unknown label '离\u200b婚'; {last}same way\n")
