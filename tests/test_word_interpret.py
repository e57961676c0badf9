"""analysis/word_interpret.py: exact where theory says so; its notebook runs top to bottom."""

import shutil

import nbformat
import numpy as np
import paddle
import pytest
import word_interpret
from conftest import REPO
from nbclient import NotebookClient

import metric
import model as models
import utils
from utils import UserError

TEXT = "婚姻关系存续期间欠外债5200元，至今未还。婚生女罗某1随被告生活，原告每月给付1000元抚养费。"


@pytest.fixture(scope="module")
def interpreters(checkpoint):
    return {
        m: word_interpret.WordInterpreter(checkpoint, "cpu", method=m)
        for m in ("ig", "grad", "lime")
    }


def logits_at(interpreter, text, scale):
    """Logits where the words' embeddings, but not [CLS] and [SEP], are scaled."""
    input_ids, _ = utils.encode([text], interpreter.tokenizer, interpreter.info.max_seq_length)
    factors = np.full((1, len(input_ids[0]), 1), scale, np.float32)
    factors[:, [0, -1]] = 1
    layer = interpreter.model.base_model.embeddings.word_embeddings
    hook = layer.register_forward_post_hook(lambda _, __, out: out * paddle.to_tensor(factors))
    try:
        return interpreter.labeller.forward(**utils.pad(input_ids))[0]
    finally:
        hook.remove()


def test_every_predicted_label_is_explained(interpreters):
    interpreter = interpreters["ig"]
    probs = metric.probabilities(logits_at(interpreter, TEXT, 1.0))
    names = [name for name, p in zip(interpreter.info.labels, probs) if p > 0.5]
    assert len(names) >= 2
    for interpreter in interpreters.values():
        result = interpreter(TEXT)
        assert result.labels == names and "".join(result.words) == TEXT
        assert result.attributions.shape == (len(names), len(result.words))
        np.testing.assert_allclose(result.probs, probs[probs > 0.5], atol=1e-6)


def test_integrated_gradients_are_complete(interpreters, monkeypatch):
    """Their sum is the logit's difference to the text without words (Sundararajan, axiom 1)."""
    monkeypatch.setattr(word_interpret, "STEPS", 256)
    interpreter = interpreters["ig"]
    difference = logits_at(interpreter, TEXT, 1.0) - logits_at(interpreter, TEXT, 0.0)
    labels = interpreter.info.labels
    sums = interpreter(TEXT, labels).attributions.sum(axis=1)
    assert np.abs(difference).max() > 3
    np.testing.assert_allclose(sums, difference, atol=0.01 * np.abs(difference).max())


def test_gradients_are_right(interpreters):
    """Against differences: Paddle's are wrong where a LayerNorm is frozen."""
    interpreter, h = interpreters["ig"], 0.001  # the logits bend within 0.01
    expected = (
        (logits_at(interpreter, TEXT, 0.5 + h) - logits_at(interpreter, TEXT, 0.5 - h)) / 2 / h
    )
    input_ids, words, word_of = interpreter._encode(TEXT)
    sums = interpreter._along_path(input_ids, word_of, len(words), range(20), [0.5]).sum(axis=1)
    np.testing.assert_allclose(sums, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["ig", "grad"])
def test_the_scale_of_the_logits_does_not_show(interpreters, method, monkeypatch):
    """It only keeps the gradients from being subnormal numbers."""
    scaled = interpreters[method](TEXT, interpreters[method].info.labels).attributions
    monkeypatch.setattr(models, "LOSS_SCALE", 1.0)
    plain = interpreters[method](TEXT, interpreters[method].info.labels).attributions
    np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize("method", word_interpret.METHODS)
def test_key_words(interpreters, method):
    """Each label has its own evidence."""
    text = "双方自2015年起一直分居。因看病借款5万元，系夫妻共同债务。"
    result = interpreters[method](text, ["婚后分居", "有夫妻共同债务"])
    key_words = {name: result.key_words(i, 3) for i, name in enumerate(result.labels)}
    assert "分居" in key_words["婚后分居"] and "分居" not in key_words["有夫妻共同债务"]
    assert {"共同", "债务", "借款"} & set(key_words["有夫妻共同债务"])


@pytest.mark.parametrize("method", word_interpret.METHODS)
def test_reproducible(checkpoint, interpreters, method):
    other = word_interpret.WordInterpreter(checkpoint, "cpu", method=method)
    np.testing.assert_array_equal(other(TEXT).attributions, interpreters[method](TEXT).attributions)


@pytest.mark.parametrize("method", word_interpret.METHODS)
def test_odd_texts(checkpoint, interpreters, method):
    """No words, only unknown ones, too long a text, letters and blanks."""
    empty = interpreters[method]("")
    assert empty.words == [] and empty.attributions.shape == (1, 0)
    for text in ("𠀀𠀁", "A b,  C\u3000d！", "ΑΒΓ①㈠"):
        result = interpreters[method](text)
        assert "".join(result.words) == text and np.isfinite(result.attributions).all()
    short = word_interpret.WordInterpreter(checkpoint, "cpu", 16, method)
    result = short(TEXT)
    assert TEXT.startswith("".join(result.words)) and 10 < len("".join(result.words)) < 24


def test_words_that_share_a_token(interpreters):
    """The tokenizer makes one token of what jieba takes apart: the words are joined."""
    text = "原告１２３元，Café负担。"
    assert {"１", "２", "３"} <= set(word_interpret.jieba.lcut(text))
    result = interpreters["ig"](text)
    assert "１２３" in result.words and "Café" in result.words and "".join(result.words) == text


def test_errors(checkpoint, interpreters):
    with pytest.raises(UserError, match="method 'shap': use one of ig, grad, lime"):
        word_interpret.WordInterpreter(checkpoint, "cpu", method="shap")
    with pytest.raises(UserError, match="unknown label '甲'"):
        interpreters["ig"](TEXT, ["甲"])
    with pytest.raises(UserError, match="this model takes 3 to 160 tokens"):
        word_interpret.WordInterpreter(checkpoint, "cpu", 161)


def test_html():
    values = np.array([[2.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    result = word_interpret.Interpretation(
        "", ["<b>", "乙", "丙"], ["x", "y"], np.array([0.9, 0.8]), values
    )
    page = word_interpret.to_html([result], ["<i>"])
    assert page.count("<tr>") == 3 and "<b>" not in page and "<i>" not in page
    assert "x (0.90)" in page and "y (0.80)" in page
    assert 'hsl(120, 75%, 60%)">&lt;b&gt;' in page and 'hsl(0, 75%, 80%)">乙' in page
    assert result.key_words(0, 5) == ["<b>"] and result.key_words(1, 5) == []


def test_notebook(checkpoint, hard_data, tmp_path):
    """It runs top to bottom and explains each predicted label of each text."""
    data = shutil.copytree(hard_data, tmp_path / "data")
    lines = ["Prediction\tLabel\tText", f"\t有夫妻共同债务,适当帮助\t{TEXT}", "\t\t本院查明。"]
    (data / "bad_case.txt").write_text("\n".join(lines) + "\n", "utf-8")
    notebook = nbformat.read(REPO / "analysis" / "word_interpret.ipynb", as_version=4)
    constants = notebook.cells[1]
    own = {"DEVICE": "cpu", "DATASET_DIR": str(data), "PARAM_PATH": str(checkpoint)}
    for name, value in own.items():
        assert f"\n{name} = " in "\n" + constants.source
        constants.source += f"\n{name} = {value!r}"
    resources = {"metadata": {"path": str(REPO / "analysis")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    pages = [
        output["data"]["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    expected = word_interpret.WordInterpreter(checkpoint, "cpu")(TEXT)
    assert len(pages) == 2
    for name, prob in zip(expected.labels, expected.probs):
        assert f"{name} ({prob:.2f})" in pages[0]
    assert pages[0].count("<tr>") == 1 + len(expected.labels) + 1  # the second text: one label
    assert "适当帮助 (" in pages[1] and expected.labels[0] not in pages[1].split("适当帮助 (")[1]


def test_notebook_is_clean():
    notebook = nbformat.read(REPO / "analysis" / "word_interpret.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 4 and not any(cell.outputs or cell.execution_count for cell in code)
