"""Headless Chromium, driven over its DevTools protocol: type, click, read what the page shows.

    with Browser(chromium, folder) as browser:
        browser.open("http://127.0.0.1:8000/")
        browser.click("#predict")

The browser reads commands from its file descriptor 3 and answers on 4 (--remote-debugging-pipe).
"""

import base64
import fcntl
import json
import os
import select
import subprocess
import time

PATIENCE = 120  # seconds; a test that waits longer has failed, however busy the machine is


class Browser:
    """One page. console: what went wrong there (errors, warnings, exceptions), as text."""

    def __init__(self, chromium, folder, width=1000, height=1200):
        self.console, self.count, self.unread, self.session = [], 0, b"", None
        from_us, self.commands = os.pipe()
        self.answers, to_us = os.pipe()
        # Out of the way of 3 and 4, which the child gives to the pipe.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (from_us, to_us)]
        os.close(from_us), os.close(to_us)

        def connect():
            os.dup2(ends[0], 3), os.dup2(ends[1], 4)

        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        command += ["--remote-debugging-pipe", "--no-first-run", "about:blank"]
        with open(f"{folder}.log", "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, preexec_fn=connect, close_fds=False
            )
        for end in ends:
            os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.commands), os.close(self.answers)

    def call(self, method, **params):
        """The result of a command. Raises AssertionError if the browser calls it an error."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _next_message(self):
        while b"\0" not in self.unread:
            assert select.select([self.answers], [], [], PATIENCE)[0], "the browser does not answer"
            data = os.read(self.answers, 1 << 16)
            assert data, f"the browser ended with exit status {self.process.wait()}"
            self.unread += data
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event, params):
        if event == "Runtime.consoleAPICalled":
            self.console.append(str([value.get("value") for value in params["args"]]))
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(details.get("exception", details).get("description", str(details)))
        elif event == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.console.append(f"dialog: {params['message']}")

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression):
        """The first true value of an expression."""
        end = time.monotonic() + PATIENCE
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, (expression, self.console, self.text("body"))
            time.sleep(0.05)
        return value

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def text(self, selector):
        """What a reader sees of an element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector):
        """The same of every element that fits."""
        all_of_them = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.evaluate(f"{all_of_them}.map((e) => e.innerText)")

    def click(self, selector):
        """A click with the mouse on the middle of an element, wherever it lies."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        """Text into the element that has the focus, in one go, as an input method does it."""
        self.call("Input.insertText", text=text)

    def press(self, key, code, ctrl=False, text=""):
        """A key. code: its Windows virtual key code, such as 9 for Tab; text: what it types."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                text=text,
                windowsVirtualKeyCode=code,
                modifiers=2 if ctrl else 0,
            )

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def screenshot(self, path):
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))
