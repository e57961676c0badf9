"""analysis/sparse.py and trustai_compat.py: against TrustAI on the whole model, and by hand."""

import os
import shutil
import sys

import numpy as np
import pytest
from conftest import needs_package

needs_package("trustai")
import paddle  # noqa: E402
import sparse  # noqa: E402
import trustai_compat  # noqa: E402

import model as models  # noqa: E402
import utils  # noqa: E402


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return trustai_compat.Encoder(checkpoint, "cpu")


@pytest.fixture
def data(hard_data, tmp_path):
    return shutil.copytree(hard_data, tmp_path / "data")


@pytest.fixture
def run(data, checkpoint, word_lists, run_cli):
    def run(*flags):
        own = ["--device", "cpu", "--dataset_dir", data, "--params_path", checkpoint]
        own += ["--dict_dir", word_lists, "--sparse_num", 20, "--support_num", 30]
        return run_cli(sparse.main, [*own, *flags])

    return run


FLAGS = {"dev": "--dev_file", "data": "--unlabeled_file"}


def pipe_with(content):
    """The path of a pipe that gives the content (up to 64 KiB) once."""
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    return f"/dev/fd/{reader}"


def rows(path):
    return [line.split("\t") for line in path.read_text("utf-8").splitlines()]


def cosine(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


# --------------------------------------------------------------------------------------- TrustAI
def test_parity_with_trustai_on_the_whole_model(encoder, checkpoint, hard_data):
    """Its own way: the dygraph model, its hooks, its predict_fn; ours gives the same evidence."""
    labels = encoder.info.labels
    train, _ = utils.read_examples(hard_data / "train.txt", labels)
    dev, _ = utils.read_examples(hard_data / "dev.txt", labels)
    train, dev = train[:64], dev[:10]
    model, info = models.load_checkpoint(checkpoint)

    def batch(texts):
        encoded, _ = utils.encode(texts, encoder.tokenizer, info.max_seq_length)
        return [paddle.to_tensor(array) for array in utils.pad(encoded).values()]

    trustai = trustai_compat.import_trustai()
    loader = [batch(train[i : i + 16]) for i in range(0, 64, 16)]
    theirs = trustai.FeatureSimilarityModel(model, loader, classifier_layer_name="classifier")
    ours = encoder.similarity(encoder.features(train, "train"))
    indices, scores = trustai_compat.nearest(ours, encoder.features(dev, "dev"), 5, "dev")
    for result, index, score in zip(theirs.interpret(batch(dev), 5), indices, scores):
        np.testing.assert_allclose(score, result.pos_scores, atol=1e-5)
        np.testing.assert_array_equal(index, result.pos_indexes)

    weights = trustai.RepresenterPointModel(model, loader).weight_matrix.numpy()
    points = encoder.representer_points(encoder.features(train, "train"))
    assert np.abs(weights).max() > 0
    np.testing.assert_allclose(points, weights, atol=1e-3 * np.abs(weights).max())


def test_the_stub_is_gone(encoder):
    assert not [name for name in sys.modules if name.startswith("paddle.fluid")]


def test_missing_trustai_is_one_line(run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "trustai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trustai", None)
    status, error = run()
    assert status == 2 and "pip install -r analysis/requirements.txt" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------------------------- result
def test_sparse_file(run, data, encoder):
    """The dev texts with the least mean cosine to their three nearest training texts."""
    status, error = run("--aug_strategy", "duplicate")
    assert status == 0
    labels = encoder.info.labels
    train, _ = utils.read_examples(data / "train.txt", labels)
    dev = rows(data / "dev.txt")
    similarity = cosine(
        *(encoder.features(texts, "x") for texts in ([text for text, _ in dev], train))
    )
    means = np.sort(similarity, axis=1)[:, -3:].mean(axis=1)
    expected = np.argsort(means, kind="stable")[:20]
    assert rows(data / "sparse.txt") == [dev[i] for i in expected]
    header, *scored = rows(data / "sparse.scores.tsv")
    assert header == ["score", "text", "label"]
    assert [row[1:] for row in scored] == [dev[i] for i in expected]
    np.testing.assert_allclose([float(row[0]) for row in scored], means[expected], atol=1e-5)
    assert f"Sparse data saved in {data / 'sparse.txt'}" in error
    assert f"Average score in sparse data: {means[expected].mean():.4f}" in error
    # The result is a data file: a sample without labels reads back as one.
    utils.read_examples(data / "sparse.txt", labels)


def test_support_by_duplicates(run, data, encoder):
    status, error = run("--aug_strategy", "duplicate")
    train, support = rows(data / "train.txt"), rows(data / "support.txt")
    assert status == 0 and len(support) == 30
    texts = [text for text, _ in support]
    assert all(row in train for row in support) and len(set(texts)) == 30
    # The first is the nearest of the sparsest text, unless that is a dev text, too.
    sparsest = encoder.features([rows(data / "sparse.txt")[0][0]], "x")
    train_features = encoder.features([text for text, _ in train], "x")
    assert support[0] == train[int(cosine(sparsest, train_features).argmax())]
    scores = [float(row[0]) for row in rows(data / "support.scores.tsv")[1:]]
    assert min(scores) > 0.7
    assert f"support data saved in {data / 'support.txt'}" in error
    assert f"support average scores: {np.mean(scores):.4f}" in error


@pytest.mark.parametrize("strategy", ["substitute", "insert", "delete", "swap"])
def test_augmented_support(run, data, strategy):
    assert run("--aug_strategy", strategy, "--support_num", 10)[0] == 0
    known = {text for name in ("train", "dev") for text, _ in rows(data / f"{name}.txt")}
    support = rows(data / "support.txt")
    assert len({text for text, _ in support} - known) == len(support) == 10
    first = (data / "support.txt").read_bytes()
    run("--aug_strategy", strategy, "--support_num", 10)
    assert (data / "support.txt").read_bytes() == first


def test_dev_texts_never_become_training_data(run, data):
    """A candidate that is also in dev (or, to annotate, in train) is left out."""
    leaked = (data / "dev.txt").read_text("utf-8").splitlines()
    with open(data / "train.txt", "a", encoding="utf-8") as file:
        file.write("\n".join(leaked) + "\n")
    status, error = run("--aug_strategy", "duplicate")
    assert status == 0 and f"{len(leaked)} candidates are left out: their texts are in dev" in error
    dev = {line.split("\t")[0] for line in leaked}
    assert not dev & {text for text, _ in rows(data / "support.txt")}

    new = (data / "data.txt").read_text("utf-8").splitlines()
    known = [leaked[0].split("\t")[0], rows(data / "train.txt")[9][0]]
    lines = ["text\tlabel", *known, "", *new, new[3], new[4] + "\t离婚"]  # repeated, labelled
    (data / "data.txt").write_text("\n".join(lines) + "\n", "utf-8")
    status, error = run("--annotate", "--support_threshold", "-1", "--support_num", "1000")
    assert status == 0 and "2 candidates are left out: their texts are in train or dev" in error
    assert f"Only {len(new)} support texts of 1000; lower --support_threshold or give more" in error
    found = (data / "support.txt").read_text("utf-8").splitlines()
    assert sorted(found) == sorted(new)
    assert rows(data / "support.scores.tsv")[0] == ["score", "text"]


def test_inputs_are_read_once(run, data):
    """Each may be a pipe; what a text holds beside line feeds does not end a line."""
    odd = "原告起诉\u2028离婚\x85分割\r财产。"
    content = {name: (data / f"{name}.txt").read_text("utf-8") for name in ("dev", "data")}
    content["data"] = f"{odd}\n{content['data']}"
    flags = ["--annotate", "--support_threshold", "-1", "--support_num", "1000"]
    status, error = run(*flags, *(a for n in content for a in (FLAGS[n], pipe_with(content[n]))))
    assert status == 0, error
    support = (data / "support.txt").read_bytes().decode().split("\n")
    assert sorted(support) == sorted({"", *content["data"].replace("\r", " ").split("\n")})


def test_a_text_is_taken_once(run, data):
    lines = (data / "train.txt").read_text("utf-8")
    (data / "train.txt").write_text(lines + lines, "utf-8")
    run("--aug_strategy", "duplicate")
    texts = [text for text, _ in rows(data / "support.txt")]
    assert len(texts) == len(set(texts)) == 30


def test_number_of_ranks(run, data):
    """By default enough of them; with one rank there are at most as many as sparse texts."""
    run("--aug_strategy", "duplicate", "--support_threshold", "-1")
    everything = rows(data / "support.txt")
    run(
        "--aug_strategy", "duplicate", "--support_threshold", "-1", "--rationale_num_support", "300"
    )
    assert rows(data / "support.txt") == everything and len(everything) == 30
    status, error = run("--aug_strategy", "duplicate", "--rationale_num_support", "1")
    support = rows(data / "support.txt")
    assert status == 0 and support == everything[: len(support)] and len(support) <= 20
    assert f"Only {len(support)} support texts of 30; " in error
    assert "or raise --rationale_num_support" in error


def test_find_support():
    indices = np.array([[1, 2, 3], [1, 4, 2], [5, 1, 6]])
    scores = np.array([[0.9, 0.8, 0.2], [0.95, 0.7, 0.6], [0.3, 0.2, 0.1]])
    found = list(sparse.find_support(indices, scores, 0.5, excluded={4}))
    assert found == [(1, 0.9), (2, 0.8)]  # 2 of the second text is taken already
    assert list(sparse.find_support(indices, scores, 0.25, set()))[:3] == [
        (1, 0.9),
        (5, 0.3),
        (2, 0.8),
    ]
    assert list(sparse.find_support(indices, scores, 0.95, set())) == []


# ---------------------------------------------------------------------------------------- errors
def test_no_support(run, data):
    status, error = run("--aug_strategy", "duplicate", "--support_threshold", "1.1")
    assert status == 2 and not (data / "support.txt").exists() and (data / "sparse.txt").exists()
    assert "no support data above the threshold, none written; lower --support_threshold" in error


FAULTS = {
    "more than dev": (["--sparse_num", "81"], "--sparse_num 81: dev.txt has only 80 samples"),
    "no train": (["--train_file", "x.txt"], "x.txt: No such file"),
    "no data": (["--annotate", "--unlabeled_file", "x.txt"], "x.txt: No such file"),
    "no checkpoint": (["--params_path", "none"], "none: no such folder"),
    "too long": (["--max_seq_length", "161"], "this model takes 3 to 160 tokens"),
    "no lists": (["--dict_dir", "none"], "--dict_dir none: no stopwords.txt; bring it from"),
    "device": (["--device", "tpu"], "--device tpu: "),
    "no folder": (["--sparse_file", "x/sparse.txt"], "sparse.txt: no folder"),
    "over an input": (["--sparse_file", "dev.txt"], "dev.txt: it is an input of this command"),
    "over another": (
        ["--support_file", "sparse.tsv"],
        "sparse.scores.tsv: it is another result",
    ),
    "blank data": (["--annotate", "--unlabeled_file", "blank.txt"], "blank.txt: no texts; write"),
}


def test_model_and_word_lists_are_not_replaced(run, checkpoint, word_lists):
    for path in (
        checkpoint / "config.json",
        checkpoint / "vocab.txt",
        word_lists / "stopwords.txt",
    ):
        before = path.read_bytes()
        status, error = run("--support_file", path)
        assert status == 2 and f"{path.name}: it is an input of this command" in error
        assert path.read_bytes() == before


@pytest.mark.parametrize("fault", FAULTS)
def test_errors(run, data, fault):
    (data / "blank.txt").write_text("\n \n\t\n", "utf-8")
    before = sorted(path.name for path in data.iterdir())
    flags, message = FAULTS[fault]
    status, error = run(*flags)
    assert status == 2 and message in error and "Traceback" not in error
    assert sorted(path.name for path in data.iterdir()) == before
