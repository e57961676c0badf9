"""analysis/aug.py and word_lists.py: what becomes of the words, and where the lists come from."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import aug
import numpy as np
import pytest
import word_lists as word_lists_script
from conftest import REPO

import utils

VOCAB = "baidu_encyclopedia_w2v_vocab.json"


@pytest.fixture
def run(hard_data, word_lists, tmp_path, run_cli):
    """run(*flags) returns (exit status, stderr, [(text, label string)] of the result or None)."""

    def run(*flags, train=hard_data / "train.txt", dict_dir=word_lists):
        path = tmp_path / "aug.txt"
        path.unlink(missing_ok=True)
        own = ["--train_path", train, "--aug_path", path, "--device", "cpu"]
        own += ["--label_file", hard_data / "label.txt"]
        own += ["--dict_dir", dict_dir] if dict_dir else []
        status, error = run_cli(aug.main, [*own, *flags])
        rows = None
        if path.exists():
            rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
        return status, error, rows

    return run


def source_rows(folder):
    return [line.split("\t") for line in (folder / "train.txt").read_text("utf-8").splitlines()]


def is_subsequence(short, long):
    rest = iter(long)
    return all(character in rest for character in short)


def is_similar(new, old):
    return len(Counter(new) & Counter(old)) >= 0.5 * len(Counter(old))


FROM = {  # can the new text have been made from the old one?
    "substitute": is_similar,
    "mix": is_similar,
    "insert": lambda new, old: is_subsequence(old, new) and len(new) > len(old),
    "delete": lambda new, old: is_subsequence(new, old) and len(new) < len(old),
    "swap": lambda new, old: Counter(new) == Counter(old) and new != old,
}


@pytest.mark.parametrize("strategy", ["mix", *aug.STRATEGIES])
def test_new_texts(run, hard_data, strategy):
    """Labels are kept, nothing is doubled, no text of the training set comes again."""
    status, error, rows = run("--aug_strategy", strategy)
    sources = source_rows(hard_data)
    assert status == 0 and f"{len(rows)} augmented texts of {len(sources)} saved in" in error
    texts = [text for text, _ in rows]
    assert len(set(texts)) == len(texts) and not set(texts) & {text for text, _ in sources}
    assert len(sources) < len(texts) <= 2 * len(sources)
    # Results come in the order of the training set, at most two for each of its texts.
    i, used = 0, 0
    for text, labels in rows:
        while used == 2 or labels != sources[i][1] or not FROM[strategy](text, sources[i][0]):
            i, used = i + 1, 0  # IndexError: no text of the training set can be its source
        used += 1
    assert any(labels == "" for _, labels in rows)  # of the samples without labels


def test_substitutes_are_synonyms(run, word_lists):
    synonyms = json.loads((word_lists / "word_synonym.json").read_text("utf-8"))
    augmenter = aug.make_augmenter("substitute", 0.1, word_lists)
    found = set()
    text = "原告与被告于2010年登记结婚，双方生育一子，婚后感情不和，请求法院判决离婚。"
    words = augmenter.tokenizer.cut(text)
    pattern = "".join(f"({'|'.join([word, *synonyms.get(word, [])])})" for word in words)
    for _ in range(50):
        ((new,),) = augmenter.augment(text)
        match = re.fullmatch(pattern, new)
        assert match and new != text
        found |= set(match.groups()) - set(words)
    assert len(found) > 5


def test_swap_honours_the_percentage(run, word_lists):
    text = (
        "原告 被告 双方 离婚 抚养 判决 共同 生育 请求 结婚 要求 分居 登记 法院 协议 女儿".replace(
            " ", ""
        )
    )

    def moved(percent):
        augmenter = aug.make_augmenter("swap", percent, word_lists)
        words = augmenter.tokenizer.cut(text)
        news = [augmenter.tokenizer.cut(augmenter.augment(text)[0][0]) for _ in range(20)]
        return np.mean([sum(a != b for a, b in zip(words, new)) for new in news])

    assert moved(0.3) > 1.5 * moved(0.05)


def test_mix_uses_all_strategies(run, hard_data, tmp_path):
    """Four draws for a text: one of each."""
    source = next(text for text, _ in source_rows(hard_data) if len(text) > 60)
    (tmp_path / "one.txt").write_text(f"{source}\t\n", "utf-8")
    _, _, rows = run("--aug_strategy", "mix", "--create_n", "4", train=tmp_path / "one.txt")
    kinds = [
        next(kind for kind in ("delete", "insert", "swap", "substitute") if FROM[kind](new, source))
        for new, _ in rows
    ]
    assert kinds == ["substitute", "insert", "delete", "swap"]


class Stub:
    """An augmenter that answers what it is told to."""

    max_length = None

    def __init__(self, *answers):
        self.answers = list(answers)

    def augment(self, text):
        return [[self.answers.pop(0)] if self.answers else []]


def test_pieces_and_repetitions_are_refused():
    odd = ["##甲", "[UNK]乙", "丙\t丁", "戊\n己", "旧", " ", "原文"]
    for answer in odd:
        assert aug.new_texts("原文", iter([Stub(answer, "新文")] * 2), 1, {"旧", "原文"}) == [
            "新文"
        ]
    seen = {"原文"}
    assert aug.new_texts("原文", iter([Stub("新", "新", "更新")] * 9), 2, seen) == ["新", "更新"]
    assert seen == {"原文", "新", "更新"}
    # What the text itself has may come again.
    assert aug.new_texts("见[1]", iter([Stub("看[1]")]), 1, set()) == ["看[1]"]


def test_seed(run):
    first, again, other = (run("--seed", seed)[2] for seed in (1, 1, 2))
    assert first == again and first != other


def test_same_file_in_another_process(run, hard_data, word_lists, tmp_path):
    expected = run("--aug_strategy", "mix")[2]
    command = [sys.executable, REPO / "analysis" / "aug.py", "--dict_dir", word_lists]
    command += ["--aug_strategy", "mix"]
    command += ["--train_path", hard_data / "train.txt", "--aug_path", tmp_path / "other"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = (tmp_path / "other").read_text("utf-8").splitlines()
    assert [line.split("\t") for line in lines] == expected


def test_texts_that_give_too_few(run, tmp_path):
    (tmp_path / "t.txt").write_text(
        "原告与被告感情不和，请求法院判决离婚。\t准予离婚\n无\t\n", "utf-8"
    )
    status, error, rows = run(train=tmp_path / "t.txt")
    assert status == 0 and "1 of 2 texts gave fewer than 2 new ones" in error
    assert [labels for _, labels in rows] == ["准予离婚"] * 2


# ------------------------------------------------------------------------------------ word lists
@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr("paddle.utils.download.get_path_from_url", fail)
    monkeypatch.setattr("paddlenlp.utils.env.DATA_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_network_and_no_lists(run, no_network):
    status, error, rows = run(dict_dir=None)
    assert status == 2 and rows is None
    assert re.search(r"stopwords.txt cannot be downloaded .*: bring it from http\S+ or make", error)
    assert "give its folder as --dict_dir" in error and "Traceback" not in error


def test_lists_in_the_cache_are_used(run, no_network, word_lists):
    """dataaug keeps a folder for each of its classes; any of them will do."""
    expected = run()[2]
    shutil.copytree(word_lists, no_network / "WordInsert")
    assert run(dict_dir=None)[2] == expected


def test_downloaded_once(monkeypatch, tmp_path, word_lists):
    calls = []

    def download(url, folder, md5):
        calls.append(url)
        Path(folder).mkdir(parents=True, exist_ok=True)
        return shutil.copy(word_lists / url.rsplit("/", 1)[1], folder)

    monkeypatch.setattr("paddle.utils.download.get_path_from_url", download)
    monkeypatch.setattr("paddlenlp.utils.env.DATA_HOME", str(tmp_path / "cache"))
    for strategy in aug.STRATEGIES:
        aug.make_augmenter(strategy, 0.1)
    assert len(calls) == len(set(calls)) == 3


def test_faults(run, tmp_path, word_lists, hard_data):
    broken = shutil.copytree(word_lists, tmp_path / "broken")
    (broken / "word_synonym.json").write_text("{", "utf-8")
    empty = shutil.copytree(word_lists, tmp_path / "empty")
    (empty / "word_synonym.json").write_text('{"离婚": []}', "utf-8")
    vocab = shutil.copytree(word_lists, tmp_path / "vocab")
    (vocab / VOCAB).write_text("{", "utf-8")
    (tmp_path / "short.txt").write_text("无\t\n", "utf-8")
    (tmp_path / "bad.txt").write_text("a\t未知\n", "utf-8")
    faults = [
        (run("--aug_type", "homonym"), f"--dict_dir {word_lists}: no word_homonym.json; bring it"),
        (run(dict_dir=broken), f"{broken / 'word_synonym.json'}: not valid JSON"),
        (run(dict_dir=empty), f"{empty / 'word_synonym.json'}: '离婚' has no list of words"),
        (run(dict_dir=vocab), f"{vocab / VOCAB}: cannot be loaded (JSONDecodeError"),
        (run("--aug_path", hard_data / "train.txt"), "train.txt: it is an input of this command"),
        (run(train=tmp_path / "short.txt"), "short.txt: no text could be augmented; nothing was"),
        (run(train=tmp_path / "bad.txt"), "bad.txt:1: unknown label '未知'"),
        (run(train=tmp_path / "none.txt"), "none.txt: No such file"),
        (run("--label_file", tmp_path / "none"), "none: No such file"),
        (run("--aug_path", tmp_path / "no" / "aug.txt"), "aug.txt: no folder"),
        (run("--aug_type", "mlm", "--mlm_model", "none"), "--mlm_model none: cannot be loaded"),
    ]
    for (status, error, rows), message in faults:
        assert status == 2 and rows is None and message in error, error
        assert "Traceback" not in error


def test_inputs_are_not_replaced(run, hard_data, word_lists, tmp_path, run_cli):
    lists = shutil.copytree(word_lists, tmp_path / "lists")
    for path in (lists / "stopwords.txt", lists / VOCAB, hard_data / "label.txt"):
        before = path.read_bytes()
        status, error, _ = run("--aug_path", path, "--aug_strategy", "delete", dict_dir=lists)
        assert status == 2 and f"cannot write {path}: it is an input of this command" in error
        assert path.read_bytes() == before
    (lists / "stopwords.txt").write_text("Aa01A01= 债务 欠款\n", "utf-8")
    before = {path.name: path.read_bytes() for path in lists.iterdir()}
    flags = ["--synonym_file", lists / "stopwords.txt", "--output_dir", lists]
    status, error = run_cli(word_lists_script.main, flags)
    assert status == 2 and "stopwords.txt: it is an input of this command" in error
    assert {path.name: path.read_bytes() for path in lists.iterdir()} == before


def test_lines_end_at_a_line_feed_alone(run, hard_data, tmp_path):
    text = "原告与被告感情不和，\u2028请求法院\x85判决\r离婚。"
    (tmp_path / "t.txt").write_bytes(f"{text}\t准予离婚\r\n{text}婚后分居。\t\r\n".encode())
    status, error, _ = run(train=tmp_path / "t.txt")
    assert status == 0 and "4 augmented texts of 2" in error
    _, ids = utils.read_examples(tmp_path / "aug.txt", utils.read_labels(hard_data / "label.txt"))
    assert [len(i) for i in ids] == [1, 1, 0, 0]


def test_help_waits_for_no_large_package():
    """Each script answers where Paddle, TrustAI, scikit-learn, jieba, Matplotlib are not loaded."""
    code = """import os, runpy, sys
names = "paddle paddlenlp trustai sklearn jieba matplotlib".split()
sys.modules.update(dict.fromkeys(names))  # None: cannot be imported
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    sys.path.insert(0, os.path.dirname(path))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, path
"""
    scripts = [
        REPO / "analysis" / f"{name}.py" for name in ("aug", "dirty", "sparse", "word_lists")
    ]
    scripts.append(REPO / "analysis" / "sent_interpret.py")
    scripts += [
        REPO / "data" / f"{n}.py" for n in ("check", "doccano", "init_model", "make_sample")
    ]
    command = [sys.executable, "-c", code, *scripts]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("usage: ") == 9, run.stderr


def test_word_lists(tmp_path, run_cli):
    (tmp_path / "s.txt").write_text("Aa01A01= 债务 欠款 债\nAa01A02# 甲乙 丙丁\n", "utf-8")
    flags = ["--output_dir", tmp_path / "a" / "b"]
    status, error = run_cli(word_lists_script.main, [*flags, "--synonym_file", tmp_path / "s.txt"])
    assert status == 0 and "2 of them with synonyms" in error
    synonyms = json.loads((tmp_path / "a" / "b" / "word_synonym.json").read_text("utf-8"))
    assert synonyms == {"债务": ["欠款"], "欠款": ["债务"]}
    (tmp_path / "s.txt").write_text("债务 欠款\n", "utf-8")
    status, error = run_cli(word_lists_script.main, [*flags, "--synonym_file", tmp_path / "s.txt"])
    assert status == 2 and "s.txt: no line like 'Aa01A02= word word'" in error
    # Without synonyms delete and swap work.
    assert run_cli(word_lists_script.main, ["--output_dir", tmp_path / "c"])[0] == 0
    assert aug.make_augmenter("delete", 0.1, tmp_path / "c").augment(
        "双方共同生活多年后登记结婚。"
    )[0]


# ------------------------------------------------------------------- masked language model
@pytest.fixture(scope="module")
def mlm(tiny_model, tmp_path_factory):
    """A random masked language model as a local folder."""
    import paddle

    from model import transformers

    folder = tmp_path_factory.mktemp("mlm")
    paddle.seed(1)
    model = transformers.ErnieForMaskedLM(transformers.ErnieConfig.from_pretrained(str(tiny_model)))
    model.save_pretrained(str(folder))
    utils.copy_tokenizer(tiny_model, folder)
    return folder


def test_masked_language_model(run, mlm, hard_data, tmp_path):
    lines = (hard_data / "train.txt").open(encoding="utf-8").readlines()[20:30]
    lines.insert(3, "双方共同生活。" * 40 + "\t\n")  # longer than the model's 160 positions
    (tmp_path / "few.txt").write_text("".join(lines), "utf-8")
    flags = ["--aug_type", "mlm", "--mlm_model", mlm]
    for strategy in ("substitute", "insert"):
        status, error, rows = run(*flags, "--aug_strategy", strategy, train=tmp_path / "few.txt")
        assert status == 0, error
        sources = {line.split("\t")[0] for line in (tmp_path / "few.txt").open(encoding="utf-8")}
        assert 5 <= len(rows) <= 20 and not {text for text, _ in rows} & sources
        assert not any("##" in text or "[" in text for text, _ in rows)
        again = run(*flags, "--aug_strategy", strategy, train=tmp_path / "few.txt")[2]
        assert again == rows


def test_a_model_is_loaded_only_where_it_is_needed(run):
    flags = ["--aug_type", "mlm", "--mlm_model", "none", "--device", "tpu"]
    assert run(*flags, "--aug_strategy", "delete")[0] == 0


def test_unfit_language_models(run, tiny_model, mlm, tmp_path):
    status, error, _ = run("--aug_type", "mlm", "--mlm_model", tiny_model)
    assert status == 2 and f"--mlm_model {tiny_model}: it has no head for masked words" in error
    evil = shutil.copytree(mlm, tmp_path / "evil")

    class Run:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (evil / "model_state.pdparams").write_bytes(pickle.dumps(Run()))
    status, error, _ = run("--aug_type", "mlm", "--mlm_model", evil)
    assert status == 2 and "broken weights file" in error and not (tmp_path / "ran").exists()
