"""utils.py: the data contract, token ids, batches. What it keeps on disk is in test_data.py."""

import argparse
import csv
import json
import random
import shutil
import statistics
import sys
import tracemalloc
import unicodedata
import unittest
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SAMPLE, needs_package
from tokenizers import Regex, Tokenizer, pre_tokenizers

import model as models
import utils
from utils import UserError

LABELS = ["离婚", "财产", "债务"]


@pytest.fixture
def put(tmp_path):
    """put(content) writes str or bytes to a file and returns its path."""

    def put(content, name="file.txt"):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return put


# ---------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize(
    "content, texts, label_ids",
    [
        ("a\t离婚,财产\nb\t债务\n", ["a", "b"], [[0, 1], [2]]),
        ("a\t\nb\t \n", ["a", "b"], [[], []]),
        ("a\t 离婚 , 财产\u3000\n", ["a"], [[0, 1]]),
        ("\ufeffa\t离婚\n", ["a"], [[0]]),
        ("a\t离婚\r\nb\t\r\n", ["a", "b"], [[0], []]),
        ("a\t离婚\nb\t财产", ["a", "b"], [[0], [1]]),
        ("a\t财产,离婚,财产\n", ["a"], [[1, 0]]),
        ("\n\na\t离婚\n \n", ["a"], [[0]]),
        ("text\tlabel\na\t离婚\n", ["a"], [[0]]),
        ("\t\na\t离婚\n", ["", "a"], [[], [0]]),
        # str.splitlines would end a line at each of these.
        ("a\u2028b\x0bc\x85d\re\t离婚\n", ["a\u2028b\x0bc\x85d\re"], [[0]]),
    ],
)
def test_examples(put, content, texts, label_ids):
    assert utils.read_examples(put(content), LABELS) == (texts, label_ids)


def test_header_is_a_sample_where_it_can_be_one(put):
    assert utils.read_examples(put("text\tlabel\n"), ["label"]) == (["text"], [[0]])


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\t离婚\nb 离婚\n", ":2: no tab"),
        ("a\tb\t离婚\n", ":1: 2 tabs"),
        ("a\t离婚\n\nb\t债\n", ":3: unknown label '债'"),
        ("a\t离婚，财产\n", ":1: unknown label '离婚，财产'"),
        ("a\t离婚,\n", ":1: unknown label ''"),
        ("a\t离婚\n".encode() + b"b\xff\t\n", ":2: not valid UTF-8 (byte 0xff at column 2)"),
        ("", ": no samples"),
        ("\n \n", ": no samples"),
        ("text\tlabel\n", ": no samples"),
    ],
)
def test_bad_examples(put, content, message):
    path = put(content)
    with pytest.raises(UserError) as error:
        utils.read_examples(path, LABELS)
    assert str(error.value).startswith(f"{path}{message}")


def test_missing_files(tmp_path):
    for read in (utils.read_labels, lambda p: utils.read_examples(p, LABELS)):
        for path in (tmp_path / "none.txt", tmp_path):
            with pytest.raises(UserError, match=str(path)):
                read(path)
    with pytest.raises(UserError, match="none.txt: No such file"):
        next(utils.read_texts(tmp_path / "none.txt"))


@pytest.mark.parametrize("faults", [10, 23])
def test_ten_faults_are_listed_at_once(put, faults):
    kinds = ["no tab\n", "a\tb\tc\n", "a\t债\n", b"\xff\t\n"]
    lines = [kinds[i % 4] for i in range(faults)]
    path = put(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    with pytest.raises(UserError) as error:
        utils.read_examples(path, LABELS)
    message = str(error.value).split("\n")
    assert [line.split(":")[1] for line in message[:10]] == [str(i) for i in range(1, 11)]
    assert message[10:] == ([f"... and {faults - 10} more such lines"] if faults > 10 else [])


def test_blank_lines_are_counted_in_one_warning(put, capsys):
    utils.read_examples(put("\na\t\n  \n\u3000\r\n"), LABELS)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "file.txt: skipped 3 blank line(s)" in warnings[0]


@pytest.mark.parametrize("content", ["离婚\n财产\n债务", "\ufeff离婚\r\n 财产 \r\n债务\r\n"])
def test_labels(put, content):
    assert utils.read_labels(put(content)) == LABELS


@pytest.mark.parametrize(
    "content, message",
    [
        ("离婚\n\n财产\n", ":2: blank"),
        ("离婚\n财产\n 离婚\n", ":3: label '离婚' is a duplicate of line 1"),
        ("离婚,财产\n", ":1: label '离婚,财产' has a comma"),
        ("离婚\t财产\n", ":1: label '离婚\t财产' has a comma or tab"),
        ("", ": no labels"),
        (b"a\n\xe5\n", ":2: not valid UTF-8"),
    ],
)
def test_bad_labels(put, content, message):
    path = put(content)
    with pytest.raises(UserError) as error:
        utils.read_labels(path)
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "content, texts",
    [
        ("a\n\nb", ["a", "", "b"]),
        ("\n\n", ["", ""]),
        ("\ufeff a\tb \r\n\r\n", [" a\tb ", ""]),
    ],
)
def test_every_line_of_a_data_file_is_a_text(put, content, texts):
    assert list(utils.read_texts(put(content))) == texts


def test_bad_data_files(put):
    with pytest.raises(UserError, match="empty file"):
        list(utils.read_texts(put("")))
    for content in (b"a\n\xff\nb\n", b"a\n\xff"):
        with pytest.raises(UserError, match="file.txt:2: not valid UTF-8"):
            list(utils.read_texts(put(content)))


# --------------------------------------------------------------------------------------- encoding
def make_folder(folder, vocab, lower=True):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "ErnieTokenizer", "do_lower_case": lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_truncation(tmp_path):
    folder = make_folder(tmp_path, [*utils.SPECIAL_TOKENS, "中", "文", "a", "##b"])
    encoded, cut = utils.encode(["中文ab", "中文", "", "中?"], utils.load_tokenizer(folder), 4)
    assert [ids.tolist() for ids in encoded] == [[1, 5, 6, 2], [1, 5, 6, 2], [1, 2], [1, 5, 4, 2]]
    assert cut == 1 and all(ids.dtype == np.int32 for ids in encoded)


def test_cut_texts_are_reported(capsys):
    for long_text, what in (("truncate", "their tails are cut"), ("window", "split into windows")):
        utils.log_truncation(0, 8, 128, long_text)
        assert not capsys.readouterr().err
        utils.log_truncation(2, 8, 128, long_text)
        shown = capsys.readouterr().err
        assert "2 of 8 texts (25.0%) are longer than max_seq_length 128" in shown and what in shown


@pytest.fixture
def digits(tmp_path):
    """A tokenizer whose token i is the character chr(0x4E00 + i)."""
    vocab = [*utils.SPECIAL_TOKENS, *(chr(0x4E00 + i) for i in range(5, 2000))]
    return utils.load_tokenizer(make_folder(tmp_path, vocab))


def numbered(length):
    """A text of the tokens 5, 6, ..., which say where they stand."""
    return "".join(chr(0x4E00 + 5 + i) for i in range(length))


def test_windows_by_hand(digits):
    """At most 10 tokens: 8 of the text, 2 of them again in the next window, the last one full."""
    texts = [numbered(n) for n in (8, 9, 0, 16)]
    encoded, split = utils.encode(texts, digits, 10, "window")
    spans = [(ids[1] - 5, ids[-2] - 5) for ids in encoded if len(ids) > 2]
    assert spans == [(0, 7), (0, 7), (1, 8), (0, 7), (6, 13), (8, 15)]
    assert encoded.first == [0, 1, 3, 4] and split == 2
    assert all(ids[0] == 1 and ids[-1] == 2 and ids.dtype == np.int32 for ids in encoded)


@pytest.mark.parametrize("longest", [3, 4, 7, 10, 128])
def test_windows_hold_every_token(digits, longest):
    lengths = [*range(0, 40), *range(120, 132), 255, 256, 1000]
    texts = [numbered(length) for length in lengths]
    encoded, split = utils.encode(texts, digits, longest, "window")
    truncated, cut = utils.encode(texts, digits, longest)
    assert split == cut == sum(length > longest - 2 for length in lengths)
    for i, length in enumerate(lengths):
        windows = encoded[encoded.first[i] : [*encoded.first, len(encoded)][i + 1]]
        assert windows[0].tolist() == truncated[i].tolist()
        parts = [ids[1:-1].tolist() for ids in windows]
        seen = sorted({token for part in parts for token in part})
        assert seen == list(range(5, 5 + length))
        if length > longest - 2:
            assert {len(part) for part in parts} == {longest - 2}
            shared = [len(set(a) & set(b)) for a, b in zip(parts, parts[1:])]
            assert set(shared[:-1]) <= {(longest - 2) // 4} and shared[-1] >= (longest - 2) // 4
        else:
            assert len(parts) == 1


def test_long_texts_are_tokenised_few_at_a_time(digits, monkeypatch):
    """What the tokenizer returns takes far more memory than the ids."""
    sizes = []

    class Watched:
        token_to_id, normalizer = digits.token_to_id, digits.normalizer
        pre_tokenizer = digits.pre_tokenizer

        def encode_batch(self, texts, **kwargs):
            sizes.append(sum(map(len, texts)))
            return digits.encode_batch(texts, **kwargs)

    monkeypatch.setattr(utils, "ENCODE_CHARACTERS", 10_000)
    texts = ["短", *[numbered(1900)] * 25, ""]
    for long_text in ("truncate", "window"):
        found, cut = utils.encode(texts, Watched(), 128, long_text)
        assert cut == 25 and max(sizes) < 12_000 < sum(sizes)
        expected = [utils.encode([text], digits, 128, long_text)[0] for text in texts]
        assert list(map(list, found)) == [list(ids) for part in expected for ids in part]


HOSTILE = {
    "ideographs": "中",
    "words": "ab ",
    "one word": "a",
    "digits": "7",
    "emoji": "😀",
    "kana": "が",
    "Cyrillic": "й",
    "accents": "é",
    "punctuation": "！",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_what_is_far_behind_the_cut_is_not_tokenised(unit, digits):
    """100 kB took the tokenizer up to 0.3 s for the first 126 tokens."""
    seen = []

    class Watched:
        token_to_id, normalizer = digits.token_to_id, digits.normalizer
        pre_tokenizer = digits.pre_tokenizer

        def encode_batch(self, texts, **kwargs):
            seen.extend(texts)
            return digits.encode_batch(texts, **kwargs)

        def encode(self, text, **kwargs):
            seen.append(text)
            return digits.encode(text, **kwargs)

    text = unit * 100_000
    (found,), cut = utils.encode([text], Watched(), 128)
    whole = digits.encode(text, add_special_tokens=False).ids
    assert found.tolist() == [1, *whole[:126], 2] and cut == (len(whole) > 126)
    assert sum(map(len, seen)) < 5000


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"tokenize_chinese_chars": False}])
def test_ids_of_long_texts_are_those_of_the_whole(config, tmp_path):
    """Random texts of everything that a tokenizer treats in its own way, at many lengths."""
    rng, units = (
        random.Random(3),
        ["中", "文", "a", "Ab", "7", " ", "\t", "，", "。", "!", "-", "é"],
    )
    units += ["\u0301", "\u200d", "\x01", "[SEP]", "[", "CLS]", "😀", "👍🏽", "が", "й", "한", "+"]
    units += ["\u3000", "\xa0", "\r\n", "ﬁ", "İ", "Σ", "\U00020000", "א", "²", "Ø", "#", "##"]
    vocab = [
        *utils.SPECIAL_TOKENS,
        *"中文a7，。!-é[]😀が+#σ²",
        "##a",
        "##b",
        "##中",
        "##😀",
        "ab",
        "e",
    ]
    folder = make_folder(tmp_path, list(dict.fromkeys(vocab)))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if config:
        (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    tokenizer = utils.load_tokenizer(folder)
    for turn in range(400):
        few = rng.sample(units, rng.choice([1, 2, 3, len(units)]))
        runs = (rng.choice(few) * rng.choice([1, 1, 2, 90, 130]) for _ in range(rng.randint(1, 60)))
        text, room = "".join(runs), rng.choice([1, 3, 14])
        (found,), cut = utils.encode([text], tokenizer, room + 2)
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert found.tolist()[1:-1] == whole[:room], (turn, text)
        assert cut == (len(whole) > room)


def test_vocabulary_without_special_tokens(tmp_path):
    with pytest.raises(UserError, match="vocab.txt: No such file"):
        utils.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"\[CLS\], \[SEP\] missing"):
        utils.load_tokenizer(make_folder(tmp_path, ["[PAD]", "[MASK]", "[UNK]", "中"]))


def differences(folder, texts):
    """The texts whose ids differ from those of PaddleNLP's tokenizer of the same folder."""
    reference = models.transformers.AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(reference, models.transformers.ErnieTokenizer)
    ours, _ = utils.encode(texts, utils.load_tokenizer(folder), 512)
    theirs = (reference(text, max_seq_len=512)["input_ids"] for text in texts)
    return [text for text, a, b in zip(texts, ours, theirs) if a.tolist() != b]


def test_ids_of_the_real_set(shared, tmp_path):
    labels = utils.read_labels(shared / "data/divorce/label.txt")
    files = [shared / "data/divorce" / name for name in ("train.txt", "dev.txt")]
    texts = [text for path in files for text in utils.read_examples(path, labels)[0]]
    vocab = utils.read_texts(shared / "vocab/ernie_3.0_base_zh_vocab.txt")
    assert len(texts) == 15988
    assert differences(make_folder(tmp_path / "real", vocab), texts) == []


def test_ids_of_the_sample(tiny_model):
    lines = [line for name in ("dev", "data") for line in utils.read_texts(SAMPLE / f"{name}.txt")]
    texts = [line.split("\t")[0] for line in lines]
    assert differences(tiny_model, texts) == []


def fuzz():
    """Texts of many scripts, without the characters that the Unicode tables of this Python or of
    `tokenizers` lack: PaddleNLP's ids depend on the former, ours on the latter."""
    unassigned = pre_tokenizers.Split(Regex(r"\p{Cn}"), "isolated")
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x250, 0x300), (0x370, 0x530), (0x2000, 0x2C00)]
    ranges += [(0x3000, 0x3100), (0x4E00, 0x4F00), (0xFF00, 0xFFF0), (0x1F300, 0x1FA00)]
    rng, texts = (
        random.Random(3),
        ["a" * 100, "a" * 101, "中" * 130, "", "  ", "é" * 100, "é" * 101],
    )
    tokens = ["[SEP]", "[CLS]", "[PAD]", "[MASK]", "[UNK]", "[sep]", "[SEP", "]", " ", "x" * 101]
    for start, stop in ranges:
        pool = [chr(c) for c in range(start, stop)]
        pool = [c for c in pool if unicodedata.category(c) not in ("Cn", "Co", "Mn")]
        pool = [c for c in pool if len(unassigned.pre_tokenize_str(f"a{c}")) == 1]
        texts += [f"a{c}b{c}{c}中{c}" for c in pool]
        for mixed in (pool, pool + tokens * 20, pool[:20] + [" ", "a", "1", "中"] * 5):
            texts += ["".join(rng.choices(mixed, k=rng.randint(1, 30))) for _ in range(150)]
    return texts


@pytest.mark.parametrize("lower", [True, False])
def test_ids_of_a_fuzz(tmp_path, lower):
    """The vocabulary knows every character and its piece, so a wrong split shows in the ids."""
    texts = fuzz()
    characters = sorted({c for text in texts for c in text + text.lower() if c.strip()})
    vocab = [*utils.SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    assert differences(make_folder(tmp_path / "fuzz", vocab, lower), texts) == []


@pytest.mark.parametrize("lower", [True, False])
def test_ids_of_english(tmp_path, lower):
    text = "The Parties' naïve re-sale (café, $1,250.50!) wasn't UNFAIR; e.g. state-of-the-art™ 3°"
    pieces = ["the", "The", "part", "##ies", "un", "##fair", "UN", "##FAIR", "sale", "na", "##ive"]
    letters = sorted({c for c in text + text.lower() if c.isascii() and not c.isspace()})
    vocab = [*utils.SPECIAL_TOKENS, *pieces, *letters, *(f"##{c}" for c in letters)]
    texts = [text, *text.split(), text.replace(" ", "  "), text.upper()]
    assert differences(make_folder(tmp_path / "en", vocab, lower), texts) == []


def english_prose(folder):
    """Lines of English, in part a model's README; the same in capitals and with symbols."""
    prose = [*(folder / "README.md").read_text("utf-8").splitlines(), *sys.copyright.splitlines()]
    for module in (argparse, random, statistics, unittest):
        prose += [line for doc in (module.__doc__,) if doc for line in doc.splitlines()]
    texts = [line for line in prose if line.strip()]
    texts += [line.upper() for line in texts] + [
        f"“{line}” — naïve café, №7 ½ €3" for line in texts
    ]
    assert len(texts) > 500
    return texts


def test_ids_of_a_real_english_vocabulary(minilm, tmp_path):
    """BERT's 30522 uncased word pieces, which ERNIE 2.0 English uses too, on English prose."""
    vocab = (minilm / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert len(vocab) == 30522
    assert differences(make_folder(tmp_path / "en", vocab), english_prose(minilm)) == []


def test_ids_of_bert_are_those_of_the_published_tokenizer(minilm, tmp_path):
    """config.json says "bert": symbols stay in their words, as in BERT's pretraining."""
    published = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    published.no_padding()
    published.enable_truncation(512)
    texts = [*english_prose(minilm), *fuzz()]
    expected = [encoding.ids for encoding in published.encode_batch(texts)]
    ours, _ = utils.encode(texts, utils.load_tokenizer(minilm), 512)
    assert [text for text, a, b in zip(texts, ours, expected) if a.tolist() != b] == []
    # The rule is the model's: without config.json, or with another one, it is ERNIE's.
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copyfile(minilm / name, lone / name)
    split, _ = utils.encode(texts, utils.load_tokenizer(lone), 512)
    assert sum(a.tolist() != b for a, b in zip(split, expected)) > 100
    again, _ = utils.encode(texts, utils.load_tokenizer(lone, minilm), 512)
    assert [ids.tolist() for ids in again] == expected


@pytest.mark.parametrize(
    "settings, tokens",
    [
        ({}, ["cafe", "中", "a"]),
        ({"strip_accents": False}, ["café", "中", "a"]),
        ({"do_lower_case": False}, ["Café", "中", "a"]),
        ({"do_lower_case": False, "strip_accents": True}, ["Cafe", "中", "a"]),
        ({"tokenize_chinese_chars": False}, ["cafe", "中a"]),
    ],
)
def test_bert_follows_its_tokenizer_configuration(tmp_path, settings, tokens):
    words = ["cafe", "café", "Café", "Cafe", "中", "a", "中a"]
    folder = make_folder(tmp_path, [*utils.SPECIAL_TOKENS, *words])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert utils.load_tokenizer(folder).encode("Café 中a").tokens == tokens


def test_tokenizer_configuration_is_written_where_it_lacks(tmp_path):
    (tmp_path / "to").mkdir()
    make_folder(tmp_path / "from", utils.SPECIAL_TOKENS, lower=False)
    utils.copy_tokenizer(tmp_path / "from", tmp_path / "to")
    assert utils.read_json(tmp_path / "to/tokenizer_config.json")["do_lower_case"] is False
    for name in ("from", "to"):
        (tmp_path / name / "tokenizer_config.json").unlink()
    utils.copy_tokenizer(tmp_path / "from", tmp_path / "to")
    assert differences(tmp_path / "to", ["a[SEP]中"]) == []
    (tmp_path / "to/tokenizer_config.json").unlink()
    (tmp_path / "from/config.json").write_text('{"model_type": "bert"}')
    utils.copy_tokenizer(tmp_path / "from", tmp_path / "to")
    config = utils.read_json(tmp_path / "to/tokenizer_config.json")
    assert config["tokenizer_class"] == "BertTokenizer"


# ---------------------------------------------------------------------------------------- batches
LENGTHS = np.clip(np.random.default_rng(1).lognormal(3.8, 0.6, 3000), 3, 128).astype(int)


def padded(plan):
    return sum(len(index) * LENGTHS[index].max() for index in plan)


def test_evaluation_batches():
    plan = utils.batches(LENGTHS, 32)
    order = np.concatenate(plan)
    assert sorted(order) == list(range(3000)) and {len(b) for b in plan[:-1]} == {32}
    assert (np.diff(LENGTHS[order]) <= 0).all()


@pytest.mark.parametrize("batching", ["sorted", "random"])
def test_training_batches(batching):
    def plan(seed):
        np.random.seed(seed)  # the global state must have no say
        return [b.tolist() for b in utils.batches(LENGTHS, 32, np.random.default_rng(7), batching)]

    assert sorted(sum(plan(0), [])) == list(range(3000))
    assert plan(0) == plan(1)
    other = utils.batches(LENGTHS, 32, np.random.default_rng(8), batching)
    contents = {frozenset(batch) for batch in plan(0)}
    assert not contents & {frozenset(batch) for batch in other}  # mixed anew in each epoch


def test_sorted_batches_pad_little_and_come_in_random_order():
    rng = np.random.default_rng(7)
    plan = utils.batches(LENGTHS, 32, rng, "sorted")
    assert padded(plan) < 1.1 * LENGTHS.sum()
    assert padded(utils.batches(LENGTHS, 32, rng, "random")) > 1.8 * LENGTHS.sum()
    means = [LENGTHS[index].mean() for index in plan]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.35


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("examples", [1, 33, 97, 3000])
def test_every_rank_gets_a_batch_of_like_length(examples, world):
    lengths = LENGTHS[:examples]
    plan = utils.batches(lengths, 32, np.random.default_rng(7), group=world)
    num_batches = -(-examples // 32)
    assert len(plan) == -(-num_batches // world) * world
    assert set(np.concatenate(plan)) == set(range(examples))
    if examples == 3000:
        longest = np.array([lengths[index].max() for index in plan]).reshape(-1, world)
        spread = np.sort(longest.max(1) - longest.min(1))[:-1]  # the filled-up group may be mixed
        assert np.median(spread) <= 8


def toy_forward(input_ids, token_type_ids):
    """Logits that tell which text they belong to, and that do not depend on the padding."""
    assert input_ids.dtype == token_type_ids.dtype == np.int64 and not token_type_ids.any()
    return np.stack([input_ids.sum(1), (input_ids > 0).sum(1)], axis=1).astype(np.float32)


def toy_texts(n=50):
    rng = np.random.default_rng(2)
    return [rng.integers(1, 1000, rng.integers(2, 20)).astype(np.int32) for _ in range(n)]


def test_pad():
    batch = utils.pad([np.array([1, 2]), np.array([1, 5, 2])])
    assert batch["input_ids"].tolist() == [[1, 2, 0], [1, 5, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_logits_come_back_in_the_order_of_the_texts():
    encoded = toy_texts()
    logits = utils.logits_of(toy_forward, encoded, 8, 2)
    assert logits.tolist() == [[ids.sum(), len(ids)] for ids in encoded]


def test_windows_take_no_memory_for_their_logits():
    """40 texts of 500 windows and 1000 labels: the logits of all windows would be 80 MB."""
    windows = utils.Windows()
    windows.first = list(range(0, 20_000, 500))
    windows += [np.array([2, i % 7, 3], dtype=np.int32) for i in range(20_000)]

    def forward(input_ids, token_type_ids):
        return np.repeat(input_ids[:, 1:2], 1000, axis=1).astype(np.float32)

    tracemalloc.start()
    logits = utils.logits_of(forward, windows, 32, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert logits.shape == (40, 1000) and (logits == 6).all() and peak < 2**24


def test_logits_of_windows_are_the_greatest_of_each_text():
    windows, sizes = utils.Windows(), [3, 1, 1, 20, 7, 18]
    windows += toy_texts()
    windows.first = np.cumsum([0, *sizes[:-1]]).tolist()
    one_by_one = [(ids.sum(), len(ids)) for ids in windows]
    parts = np.split(np.array(one_by_one), windows.first[1:])
    expected = [part.max(axis=0).tolist() for part in parts]
    assert utils.logits_of(toy_forward, windows, 8, 2).tolist() == expected


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_ranks_share_the_batches(world):
    encoded = toy_texts()
    runs = [list(utils.run_batches(toy_forward, encoded, 8, r, world)) for r in range(world)]
    assert sorted(i for run in runs for _, index, _ in run for i in index) == list(range(50))
    assert sorted(number for run in runs for number, _, _ in run) == list(range(7))


def test_small_helpers():
    assert list(utils.chunks(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    for labels in (1, 20, 2000, 10_000, 10**6, 10**9):  # few texts with many labels
        info = SimpleNamespace(labels=range(labels))
        size = utils.Labeller(None, None, info).chunk_size
        assert 1 <= size <= 8192 and (size == 1 or size * labels <= 1 << 22)
        assert size == 8192 if labels <= 500 else size > 400 or labels > 10_000
    assert utils.multi_hot([[0, 2], []], 3).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert utils.at_least(3)("3") == 3 and utils.at_least(0.0)("1e-3") == 1e-3
    for minimum, value in ((3, "2"), (0.0, "-1"), (0.0, "nan")):
        with pytest.raises(argparse.ArgumentTypeError):
            utils.at_least(minimum)(value)
    with pytest.raises(ValueError):
        utils.at_least(3)("x")


# ------------------------------------------------------------------------- legal but hardly meant
LOOK = [
    ("离婚\u200b", "离婚", "it has U+200B ZERO WIDTH SPACE where {} has nothing"),
    ("a b", "a\u00a0b", "it has U+0020 SPACE where {} has U+00A0 NO-BREAK SPACE"),
    (
        "cafe\u0301",
        "caf\u00e9",
        "it has U+0065 LATIN SMALL LETTER E, U+0301 COMBINING ACUTE ACCENT where {} has U+00E9 "
        "LATIN SMALL LETTER E WITH ACUTE",
    ),
    ("离\u3000婚", "离婚", "it has U+3000 IDEOGRAPHIC SPACE where {} has nothing"),
    ("ＡＢ", "AB", "it has U+FF21 FULLWIDTH LATIN CAPITAL LETTER A, U+FF22 FULLWIDTH LATIN CAPITAL "
     "LETTER B where {} has U+0041 LATIN CAPITAL LETTER A, U+0042 LATIN CAPITAL LETTER B"),
    ("a\x08b\xad", "ab", "it has U+0008 where {} has nothing; it has U+00AD SOFT HYPHEN where {} "
     "has nothing"),
]  # fmt: skip


@pytest.mark.parametrize("name, known, what", LOOK)
def test_a_label_name_that_looks_right(put, name, known, what):
    path = put(f"甲\t{name}\n乙\t财\n")
    with pytest.raises(UserError) as error:
        utils.read_examples(path, ["财产", known])
    what = what.replace("{}", f"the label name '{known}'")
    assert str(error.value).split("\n") == [
        f"{path}:1: unknown label '{name}'; {what}; write both the same way",
        f"{path}:2: unknown label '财'; it is not among the 2 label names",
    ]


@pytest.mark.parametrize("name, known, what", LOOK)
def test_label_files_of_names_that_look_alike(put, name, known, what, capsys):
    """Two such names in one file are two classes: a warning. For one of the model's: refused."""
    path = put(f"{known}\n财产\n{name}\n", "label.txt")
    assert utils.read_labels(path) == [known, "财产", name]
    found, what = "1 label name(s) look like another", what.replace("{}", "line 1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f" - {path}: {found}: '{name}' (line 3): {what}")
    put(f"财产\n{name}\n", "label.txt")
    with pytest.raises(UserError) as error:
        utils.check_labels(path.parent, None, ["财产", known])
    assert f":2: '{name}' where the model has '{known}' (it has U+" in str(error.value)
    assert capsys.readouterr().err == ""  # no two of the file


def test_byte_order_marks_of_joined_files(put, capsys):
    """As `cat` leaves them, inside a line where a file had no last line end."""
    part = "\ufeff甲\t离婚\n"
    path = put(part * 3 + "乙\ufeff丙\t财产\n")
    assert utils.read_examples(path, LABELS) == (["甲", "甲", "甲", "乙丙"], [[0], [0], [0], [1]])
    (line,) = capsys.readouterr().err.splitlines()
    marks = "3 byte order mark(s) (U+FEFF) inside the file, first in line 2"
    assert "[ WARNING] - " in line and line.endswith(f" - {path}: removed {marks}")
    assert list(utils.read_texts(put(part))) == ["甲\t离婚"] and capsys.readouterr().err == ""
    assert list(utils.read_texts(put("a\n\ufeffb\n"))) == ["a", "b"]
    assert utils.read_labels(put("离婚\n\ufeff财产\n")) == ["离婚", "财产"]
    assert capsys.readouterr().err.count("removed 1 byte order mark(s)") == 2


def test_lines_that_end_in_carriage_returns_alone(put, capsys):
    """As some programs of the Macintosh write them."""
    with pytest.raises(UserError) as error:
        utils.read_examples(put("a\t离婚\rb\t财产\r"), LABELS)
    hint = "2 tabs; and carriage returns inside the line; save the file with LF line ends"
    assert str(error.value).endswith(f":1: {hint}")
    with pytest.raises(UserError, match=":1: carriage return inside a label name; save the file"):
        utils.read_labels(put("离婚\r财产\r"))
    path = put("a\rb\rc")
    assert list(utils.read_texts(path)) == ["a\rb\rc"]
    hint = "one text with 2 carriage return(s); if they end lines, save it with LF ends"
    assert f" - {path}: {hint}" in capsys.readouterr().err
    assert list(utils.read_texts(put("a\rb\nc"))) == ["a\rb", "c"] and not capsys.readouterr().err


def test_rows_that_every_reader_counts_alike(tmp_path):
    """What ends lines for str.splitlines() but not for those who read tables stays."""
    needs_package("pandas")
    import pandas

    stays = "甲\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029乙"
    texts = ["甲\r乙", "\t甲\r\r", '"甲" 乙', '"甲', stays, "NA"]
    names = [["离婚"], [], ["离婚", "财产"], [], [], []]
    with utils.atomic_file(tmp_path / "o.txt") as file:
        utils.write_header(file, LABELS, False, False)
        utils.write_rows(file, texts, names, LABELS, jsonl=False)
    cells = ["甲 乙", " 甲  ", *texts[2:]]
    rows = [[text, ",".join(given)] for text, given in zip(cells, names)]
    for engine in ("c", "python"):
        settings = {"quoting": 3, "keep_default_na": False, "engine": engine}  # as README.md says
        table = pandas.read_csv(tmp_path / "o.txt", sep="\t", **settings)
        assert table.values.tolist() == rows and list(table) == ["text", "label"]
    with open(tmp_path / "o.txt", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:] == rows
    with utils.atomic_file(tmp_path / "o.jsonl") as file:
        utils.write_rows(file, texts, names, LABELS, jsonl=True)
    records = pandas.read_json(tmp_path / "o.jsonl", lines=True, dtype=False)
    assert records["text"].tolist() == texts and records["labels"].tolist() == names


def test_carriage_returns_in_the_files_of_analysis(tmp_path):
    import dirty
    import evaluate
    import sparse

    with utils.atomic_file(tmp_path / "bad_case.txt") as file:
        evaluate.write_bad_cases(file, ["甲\r乙"], [[0]], [[1]], LABELS)
    assert (tmp_path / "bad_case.txt").read_bytes().decode() == "财产\t离婚\t甲 乙\n"
    assert dirty.data_lines(["甲\r乙"], [[0, 1]], LABELS) == ["甲 乙\t离婚,财产\n"]
    for names, more in ((None, ""), ([["离婚"]], "\t离婚")):
        sparse.write_result(tmp_path / "sparse.txt", ["甲\r乙"], names, [0.5])
        assert (tmp_path / "sparse.txt").read_bytes().decode() == f"甲 乙{more}\n"
        scores = (tmp_path / "sparse.scores.tsv").read_bytes().decode()
        assert scores.split("\n")[1:] == [f"0.500000\t甲 乙{more}", ""]
