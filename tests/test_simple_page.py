"""The page of simple_serving/server.py in a real Chromium, with the real server behind it."""

import base64
import hashlib
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import test_report
from browser import Browser
from conftest import REPO, SAMPLE, free_port, needs_package
from PIL import Image
from triton_server import PATIENCE, wait_until

import utils

needs_package("fastapi")
FOLDER = REPO / "deploy" / "simple_serving"
PAGE = (FOLDER / "index.html").read_text(encoding="utf-8")
LABELS = utils.read_labels(SAMPLE / "label.txt")
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
# Of the second model, which gives at least one label: the one with the highest probability for the
# first text is never given.
LIKELY = LABELS.index("准予离婚")
THRESHOLDS = [1.0 if i == LIKELY else 0.1 for i in range(len(LABELS))]
TEXTS = ["准予离婚。", "今天天气很好。", HOSTILE, "一、判决原告于某某与被告杨某某离婚；" * 12]
chromium = test_report.chromium


class Server:
    """server.py on a free port of this machine."""

    def __init__(self, *models, log):
        self.models, self.log, self.port = models, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self):
        command = [sys.executable, FOLDER / "server.py", "--port", str(self.port)]
        command += ["--model_path_prefix", *self.models]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self.ready, self.log.read_text)

    def ready(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask("GET", "health/ready") == {"ready": True}
        except OSError:
            return False

    def ask(self, method, path, value=None):
        """The JSON of an answer, as a client without a browser gets it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, f"/{path}", value and json.dumps(value))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    """Two models; the labels of the second one have hostile names and thresholds of their own."""
    folder = tmp_path_factory.mktemp("page")
    path = shutil.copytree(bundle, folder / "hostile") / utils.CONFIG_FILE
    config = utils.read_json(path)
    config["id2label"] = {str(i): f"{label}{HOSTILE}" for i, label in enumerate(LABELS)}
    config["thresholds"], config["min_labels"] = THRESHOLDS, 1
    path.write_text(json.dumps(config), encoding="utf-8")
    models = f"plain={bundle / 'float32'}", f"hostile={folder / 'hostile' / 'float32'}"
    server = Server(*models, log=folder / "log.txt")
    yield server
    server.stop()


@pytest.fixture
def page(chromium, server, tmp_path):
    """The page as it opens; what it brings into the browser's console is an error."""
    with Browser(chromium, tmp_path / "profile") as browser:
        browser.open(server.url)
        browser.wait("document.querySelector('#about').textContent")
        yield browser
        assert browser.console == []


def predict(page, *texts):
    """Types the texts, clicks, and waits for the results."""
    page.evaluate("document.querySelector('#texts').value = ''")
    page.click("#texts")
    page.type("\n".join(texts))
    page.click("#predict")
    number = sum(bool(text.strip()) for text in texts)
    page.wait(f"document.querySelectorAll('article').length === {number}")


def rows(page, number):
    """What the table of a text shows: [[label, score, threshold, whether it is given], ...]"""
    return page.evaluate(
        f"[...document.querySelectorAll('article')[{number}].querySelectorAll('tbody tr')]"
        ".filter((row) => row.checkVisibility()).map((row) => [...[...row.querySelectorAll("
        "'th, .n')].map((cell) => cell.innerText), row.className === 'given'])"
    )


def expected(server, text, model="plain"):
    """(the rows of all labels, the server's result) for a text, asked without the page."""
    thresholds = {"plain": [0.5] * len(LABELS), "hostile": THRESHOLDS}[model]
    request = {"texts": [text], "model": model, "all_scores": True}
    (result,) = server.ask("POST", "predict", request)["results"]
    given = {label["label"] for label in result["labels"]}
    order = sorted(result["scores"].items(), key=lambda item: (item[0] not in given, -item[1]))
    limits = dict(zip(result["scores"], thresholds))
    return [[n, f"{score:.3f}", f"{limits[n]:.3f}", n in given] for n, score in order], result


# ----------------------------------------------------------------------------------- the results
def test_labels_and_scores(page, server):
    predict(page, TEXTS[0], "  ", *TEXTS[1:])  # a line without a text is left out
    results = []
    for number, text in enumerate(TEXTS):
        every, result = expected(server, text)
        results.append(result)
        assert rows(page, number) == every[: max(5, len(result["labels"]))]
    assert page.texts("article blockquote") == TEXTS
    assert [result["cut"] for result in results] == [False, False, False, True]
    none = sum(not result["labels"] for result in results)
    assert none > 0 and page.text("#summary") == f"4 条文本；{none} 条没有标签；1 条被截断"
    assert page.texts(".cut") == ["文本过长：只读了开头（至多 128 个词元），其余被截去。"]
    assert page.texts("article .small:not(.cut)") == ["没有标签的概率超过阈值。"] * none
    # The rest of the labels unfolds and folds.
    button, folded = "article:nth-of-type(4) .more", rows(page, 3)
    assert page.text(button).endswith(f"其余 {20 - len(folded)} 个标签")
    page.click(button)
    assert rows(page, 3) == every and len(every) == 20
    page.click(button)
    assert rows(page, 3) == folded


def test_bars_have_the_length_of_the_scores(page, server):
    page.evaluate("document.querySelector('#model').value = 'hostile'")
    predict(page, TEXTS[0])
    every, _ = expected(server, TEXTS[0], "hostile")
    bars = page.evaluate(
        "[...document.querySelectorAll('.bar')].map((bar) => { const { left, width } ="
        " bar.getBoundingClientRect(); const [fill, mark] = [...bar.children].map((e) =>"
        " e.getBoundingClientRect()); return [fill.width / width,"
        " (mark.left + mark.width / 2 - left) / width]; })"
    )
    assert len(bars) == len(rows(page, 0)) >= 5
    for (length, mark), (_, score, threshold, _) in zip(bars, every):
        assert length == pytest.approx(float(score), abs=0.005)
        assert mark == pytest.approx(float(threshold), abs=0.005)
    # A given label comes first, though another one has a higher score and is not given.
    (first, *_, first_given), (second, *_, second_given) = rows(page, 0)[:2]
    assert first_given and not second_given and second.startswith(LABELS[LIKELY])


def test_hostile_texts_and_labels_are_shown(page, server):
    """Whatever they hold is text; a dialog or a request of theirs would be in the console."""
    page.evaluate("document.querySelector('#model').value = 'hostile'")
    predict(page, HOSTILE, TEXTS[0])
    assert page.texts("blockquote")[0] == HOSTILE
    for number, text in enumerate((HOSTILE, TEXTS[0])):
        shown = rows(page, number)
        assert shown == expected(server, text, "hostile")[0][: len(shown)]
    assert all(label.endswith(HOSTILE) for label, *_ in shown) and shown[0][3]
    assert page.evaluate("document.querySelectorAll('img, script').length") == 1  # its own script


def test_choice_of_the_model(page, server):
    plain, hostile = server.ask("GET", "info")["models"]
    about = f"20 个标签；最长 128 个词元；SHA-256 {plain['model_sha256'][:12]}…"
    assert page.text("#about") == about and page.texts("#model option") == ["plain", "hostile"]
    page.evaluate("document.querySelector('#model').focus()")
    page.press("ArrowDown", 40)
    page.wait("document.querySelector('#model').value === 'hostile'")
    predict(page, TEXTS[0])
    assert rows(page, 0)[0][0].endswith(HOSTILE)


def test_keyboard_only(page):
    page.type(TEXTS[0])  # the text box has the focus from the start
    page.press("Enter", 13, ctrl=True)
    page.wait("document.querySelectorAll('article').length === 1")
    page.evaluate("document.querySelector('article').remove()")
    for _ in range(2):  # to the choice of the model, to the button
        page.press("Tab", 9)
    assert page.evaluate("document.activeElement.id") == "predict"
    page.press("Enter", 13, text="\r")
    page.wait("document.querySelectorAll('article').length === 1")
    assert page.evaluate("document.activeElement.id") == "predict"


# ---------------------------------------------------------------------------------- the language
def test_english(page, server):
    assert page.evaluate("[document.documentElement.lang, document.title]") == [
        "zh-CN",
        "多标签文本分类",
    ]
    predict(page, TEXTS[-1])
    assert page.texts("thead th") == ["标签", "概率", "阈值"]
    page.click("#language")
    assert page.evaluate("[document.documentElement.lang, document.title]") == [
        "en",
        "Multi-label text classification",
    ]
    assert page.texts("thead th") == ["Label", "Score", "Threshold"]
    assert page.text("#predict") == "Predict" and page.text("#language") == "中文"
    assert page.text("#summary").startswith("Texts: 1; without labels: ")
    cut = "Too long: only the beginning was read (at most 128 tokens); the rest was cut."
    assert page.texts(".cut") == [cut]
    page.open(f"{server.url}?again")  # it is remembered
    assert page.text("h1") == "Multi-label text classification"
    page.open(f"{server.url}?lang=zh")  # the address wins
    assert page.text("h1") == "多标签文本分类"
    page.open(f"{server.url}?lang=fr")
    assert page.text("h1") == "Multi-label text classification"


def test_both_languages_have_the_same_words():
    chinese, english = re.search(r"zh: \{(.*?)\n  \},\n  en: \{(.*?)\n  \},", PAGE, re.S).groups()
    names = [re.findall(r"(?:^    |, )(\w+): (?=[\"(])", part, re.M) for part in (chinese, english)]
    assert names[0] == names[1] and len(names[0]) > 15
    assert set(re.findall(r'data-word="(\w+)"', PAGE)) <= set(names[0])


# ------------------------------------------------------------------------------------- the errors
def test_errors_of_the_server_are_one_line(page):
    page.click("#predict")
    page.wait("document.querySelector('#problem').innerText")
    assert page.text("#problem") == "请先输入文本，每行一条。"
    predict(page, TEXTS[0])
    assert page.text("#problem") == ""
    page.click("#texts")
    page.type("\n" + "\n".join(TEXTS[:1] * 64))
    page.click("#predict")
    page.wait("document.querySelector('#problem').innerText")
    line = "65 texts; send at most 64 in one request"
    assert page.text("#problem") == f"服务器报错（HTTP 422）：{line}"
    assert page.texts("article") == []  # of the texts before
    page.click("#language")
    assert page.text("#problem") == f"The server says (HTTP 422): {line}"
    (logged,) = page.console  # the browser's own line on the status
    assert "status of 422" in logged
    page.console.clear()


def test_server_that_goes_and_comes_back(bundle, chromium, tmp_path):
    server = Server(bundle / "float32", log=tmp_path / "log.txt")
    with Browser(chromium, tmp_path / "profile") as page:
        try:
            page.open(server.url)
            page.wait("document.querySelector('#about').innerText")
            assert not page.evaluate("document.querySelector('#choice').checkVisibility()")
        finally:
            server.stop()
        page.click("#texts")
        page.type(TEXTS[0])
        page.click("#predict")
        page.wait("document.querySelector('#problem').innerText")
        assert page.text("#problem") == "连不上服务器，请检查服务是否在运行。"
        server.start()
        try:
            page.click("#predict")
            page.wait("document.querySelectorAll('article').length === 1")
            assert page.text("#problem") == ""
        finally:
            server.stop()


# ---------------------------------------------------------------------------------- the document
def test_names_for_screen_readers(page):
    predict(page, TEXTS[0])
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    names = {(n["role"]["value"], n.get("name", {}).get("value")) for n in tree if "role" in n}
    for role, name in (
        ("textbox", "文本，每行一条"),
        ("combobox", "模型"),
        ("button", "预测"),
        ("button", "English"),
        ("article", "第 1 条文本"),
        ("columnheader", "阈值"),
        ("rowheader", rows(page, 0)[-1][0]),
    ):
        assert (role, name) in names
    assert {"status", "alert", "main"} <= {role for role, _ in names}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_narrow_window(page, server, language):
    page.resize(360, 740)
    page.open(f"{server.url}?lang={language}")
    page.wait("document.querySelector('#about').innerText")
    page.evaluate("document.querySelector('#model').value = 'hostile'")
    predict(page, "x" * 300, TEXTS[-1])
    page.click(".more")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ends = page.evaluate("[...document.querySelectorAll('.n')].map((e) => e.scrollWidth)")
    assert ends == page.evaluate("[...document.querySelectorAll('.n')].map((e) => e.clientWidth)")


def test_needs_nothing_from_elsewhere_and_runs_nothing_foreign(page):
    assert not re.search(r"://|@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|eval", PAGE)
    (script,) = re.findall(r"<script>(.*?)</script>", PAGE, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in PAGE, "write this hash into the page"
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'document.title = \\'bad\\''}))"
    )
    assert page.evaluate("document.title") == "多标签文本分类"
    wait_until(lambda: page.evaluate("true") and page.console, lambda: "the script ran")
    (logged,) = page.console
    assert "Content Security Policy" in logged
    page.console.clear()


def test_screenshot(page, tmp_path):
    predict(page, *TEXTS)
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == 1000 and image.height > 600
        colours = dict((colour[:3], n) for n, colour in image.getcolors(1 << 24))
    for drawn in ((0x25, 0x63, 0xEB), (0x9C, 0xA3, 0xAF), (0xC2, 0x41, 0x0C)):
        assert colours.get(drawn, 0) > 100  # a given label's bar, another one's, a threshold
