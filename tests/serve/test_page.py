"""The chat page in a browser, over a server whose answers are given: what it shows, keeps, and does not run."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path

import pytest

from deepseek_jax.serve.chat_page import FOLDER, POLICY

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(BROWSER is None, reason="needs a Chromium: apt-get install chromium"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright, of the extra oracle"),
]
THOUGHT = "The roots of $x^2 = 2$ are wanted."
ANSWER = r"""So \(x = \pm\sqrt{2}\), which costs $5 and not $6:

\[ x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a} \]

| a | b |
|---|---|
| 1 | **2** |

```python
print("<b>two</b>")
```
"""
HOSTILE = """<script>window.broken = 1</script><img src=x onerror="window.broken = 1">
[go](javascript:window.broken=1) ![p](https://example.org/p.png) <b onclick="x">bold</b>
$\\href{javascript:window.broken=1}{x}$ $\\htmlData{a=b}{x}$ <style>body { display: none }</style>
"""


class Handler(BaseHTTPRequestHandler):
    """What the page asks of a server, with answers that the test chooses."""

    def log_message(self, *of):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/v1/models":
            if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
                return self.told(401, {"error": {"message": "a key is wanted"}})
            return self.told(200, {"data": [{"id": "tiny-r1"}]})
        if path == "/version":
            return self.told(200, {"version": "0.1.0"})
        file = FOLDER / ("index.html" if path == "/" else path.removeprefix("/page/"))
        body = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", guess_type(file.name)[0] or "application/octet-stream")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.error:
            return self.told(self.server.error, {"error": {"message": "the queue is full"}}, {"Retry-After": "3"})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        events = [{"reasoning_content": part} for part in parts(THOUGHT)]
        events += [{"content": part} for part in parts(self.server.answer)]
        try:
            for delta in events:
                self.event({"choices": [{"delta": delta, "finish_reason": None}]})
                time.sleep(self.server.pause)
            self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            usage = {"completion_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 9}}
            usage["completion_tokens_details"] |= {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left.set()

    def event(self, data):
        self.wfile.write(f": alive\n\ndata: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def told(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())


def parts(text, size=7):
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.asked, made.answer, made.pause, made.error, made.key, made.left = (
        [],
        ANSWER,
        0.0,
        None,
        None,
        threading.Event(),
    )
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as of:
        made = of.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.problems = []
    opened.on("console", lambda message: opened.problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.goto(f"http://127.0.0.1:{server.server_port}/")
    yield opened
    context.close()


def ask(page, text="What is it?"):
    page.fill("#question", text)
    page.keyboard.press("Enter")


def finished(page):
    page.wait_for_selector(".answer .more button", timeout=10_000)


def test_an_answer_streams_folds_its_thought_and_renders_markdown_code_and_formulas(page, server):
    ask(page)
    finished(page)
    assert page.inner_text("#model") == "tiny-r1" and "0.1.0" in page.inner_text("#version")
    assert page.locator(".thought[open]").count() == 0
    assert page.inner_text(".thought summary").endswith(" s, 9 tokens")
    page.click(".thought summary")
    assert page.locator(".thought .katex").is_visible()
    answer = page.locator(".answer > .text")
    assert answer.locator(".katex").count() == 2 and answer.locator(".katex-display").count() == 1
    assert "costs $5 and not $6" in answer.inner_text()  # sums of money are no formula
    assert answer.locator("td strong").inner_text() == "2"
    assert "<b>two</b>" in answer.locator("pre code").inner_text()
    assert "75 % of drafts accepted" in page.inner_text(".answer .more")
    assert not page.problems
    assert server.asked[0]["messages"] == [{"role": "user", "content": "What is it?"}]


def test_hostile_output_is_text(page, server):
    server.answer = HOSTILE
    ask(page, "<img src=x onerror='window.broken = 1'>")
    finished(page)
    page.wait_for_timeout(200)
    assert page.evaluate("window.broken") is None
    assert page.locator("#log img, #log script, #log style, #log [onclick]").count() == 0
    assert page.locator("#log a[href^=javascript]").count() == 0
    assert "<script>window.broken = 1</script>" in page.inner_text(".answer > .text")
    assert page.is_visible("#log")
    assert not page.problems  # nothing was tried that the policy had to block


def test_stopping_leaves_what_came_and_the_server_sees_it(page, server):
    server.pause = 0.05
    ask(page)
    page.wait_for_selector(".answer > .text:not(.waiting) .katex")
    assert page.inner_text("#send") == "Stop"
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.inner_text(".answer .more") and page.inner_text("#send") == "Send"
    assert server.left.wait(5)


def test_the_conversation_goes_on_without_thoughts_and_outlives_a_reload(page, server):
    ask(page, "one")
    finished(page)
    page.reload()
    assert page.locator(".turn").count() == 2
    ask(page, "two")
    page.wait_for_selector(".answer >> nth=1 >> .more button")
    sent = server.asked[1]["messages"]
    assert [of["role"] for of in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"] == ANSWER and THOUGHT not in json.dumps(sent)
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_retry_and_edit_go_back_to_their_place(page, server):
    ask(page, "one")
    finished(page)
    page.click("text=Retry")
    finished(page)
    assert [len(of["messages"]) for of in server.asked] == [1, 1]
    page.click("text=Edit")
    assert page.input_value("#question") == "one" and page.locator(".turn").count() == 0


def test_settings_reach_the_server_and_a_key_is_asked_for(browser, server):
    server.key = "secret"
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.wait_for_selector("#status:has-text('API key')")
    page.click("#open-settings")
    for name, value in {
        "key": "secret",
        "temperature": "0.3",
        "seed": "7",
        "max_tokens": "64",
        "system": "Be kind.",
    }.items():
        page.fill(f"[name={name}]", value)
    page.select_option("[name=thinking]", "high")
    page.select_option("[name=theme]", "dark")
    page.click("text=Done")
    page.wait_for_selector("#model:has-text('tiny-r1')")
    ask(page)
    finished(page)
    asked = server.asked[0]
    wanted = {"temperature": 0.3, "seed": 7, "max_completion_tokens": 64, "reasoning_effort": "high"}
    assert {name: asked[name] for name in wanted} == wanted and "top_p" not in asked
    assert asked["messages"][0] == {"role": "system", "content": "Be kind."}
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    context.close()


def test_an_error_is_told_and_can_be_tried_again(page, server):
    server.error = 503
    ask(page)
    finished(page)
    assert page.inner_text(".failed") == "the queue is full (again in 3 s)"
    server.error = None
    page.click("text=Retry")
    page.wait_for_selector(".answer > .text .katex")
    assert page.locator(".failed").count() == 0


def test_the_conversation_is_saved_as_markdown(page):
    ask(page)
    finished(page)
    with page.expect_download() as told:
        page.click("#export")
    text = Path(told.value.path()).read_text()
    assert text.startswith("# Conversation with tiny-r1") and ANSWER in text and THOUGHT in text


def test_the_end_of_an_answer_is_in_sight_and_a_reader_who_went_up_stays_there(page, server):
    page.set_viewport_size({"width": 390, "height": 420})
    server.answer = ANSWER * 3
    ask(page)
    finished(page)
    end = "document.getElementById('log')"
    left = page.evaluate(f"{end}.scrollHeight - {end}.scrollTop - {end}.clientHeight")
    assert abs(left) < 2
    server.pause = 0.02
    ask(page, "again")
    page.wait_for_selector(".answer >> nth=1 >> :scope > .text .katex")
    page.evaluate(f"{end}.scrollTop = 0")
    page.wait_for_selector(".answer >> nth=1 >> .more button")
    assert page.evaluate(f"{end}.scrollTop") == 0


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(page, server, width):
    server.answer = ANSWER + "\n" + "x" * 500 + "\n\n$$" + "a+" * 200 + "b$$\n"
    page.set_viewport_size({"width": width, "height": 700})
    ask(page)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.getElementById('log').scrollWidth - document.getElementById('log').clientWidth") <= 1
    assert page.locator("#question").is_visible() and page.locator("#send").is_visible()
