"""The web page in a browser: the real command, two users, both languages, and nothing from elsewhere."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from lavis.generation.engine import Engine
from lavis.generation.pictures import MAX_BYTES, read_picture
from lavis.serve.session import ChatSession
from lavis.serve.web_text import EXAMPLES, TEXT, text
from tests.conftest import ROOT
from tests.serve.conftest import scene_png

gr = pytest.importorskip("gradio", reason="the web page needs gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

from lavis.serve import web  # noqa: E402
from lavis.serve.web_tab import MAX_PICTURES, Tab  # noqa: E402

BOX, BOT, USER = "#box textarea", "#chat .bot.message", "#chat .user.message"
LAST = "() => [...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.trim() ?? ''"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def command():
    """The real command and its port; it loads while the tests of parts run."""
    port = free_port()
    argv = [sys.executable, "webui_demo.py", "--model-type", "shapes", "--cpu-only", "--port", str(port)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        yield process, port
        process.terminate()
        assert process.wait(60) in (143, -15)  # -15: it was not up yet


@pytest.fixture(scope="module")
def url(command):
    process, port = command
    assert any(line.startswith(f"Open http://127.0.0.1:{port}") for line in process.stdout)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open the page as a new user. In the end: no errors in the console, and nothing asked from any other host."""
    contexts, errors, hosts = [], [], set()

    def visit(url: str, locale: str = "en-US", **options):
        context = browser.new_context(locale=locale, viewport={"width": 1200, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: hosts.add(httpx.URL(r.url).host))
        page.goto(url)
        lang = "zh" if locale.startswith("zh") else "en"
        page.wait_for_selector(f"#undo:has-text('{text('undo', lang)}')")
        page.wait_for_selector(f"html[lang={lang}]")
        return page

    visit.errors = errors
    yield visit
    for context in contexts:
        context.close()
    assert errors == []
    assert hosts - {""} == {"127.0.0.1"}


def upload(page, *files):
    page.set_input_files("#box input[type=file]", list(files))
    page.wait_for_function(
        "n => document.querySelectorAll('#box .thumbnail-item img, #box .thumbnail-image').length >= n", arg=len(files)
    )


def ask(page, question: str) -> str:
    """Ask, and wait for the whole answer."""
    before = page.locator(BOT).count()
    page.fill(BOX, question)
    page.press(BOX, "Enter")
    return answered(page, before + 1)


def answered(page, count: int) -> str:
    page.wait_for_function("n => document.querySelectorAll('#chat .bot.message').length == n", arg=count)
    page.wait_for_selector("#regenerate:not([disabled])")
    page.wait_for_selector("#box .submit-button")
    return page.evaluate(LAST)


@pytest.fixture
def scene(tmp_path):
    def scene(seed: int) -> Path:
        file = tmp_path / f"scene{seed}.png"
        file.write_bytes(scene_png(seed))
        return file

    return scene


def test_a_login_guards_everything(engine):
    page = web.serve_page(engine, port=free_port(), auth=[("ada", "secret"), ("bob", "other")], block=False)
    with httpx.Client(base_url=page.local_url) as client:
        assert client.post("/login", data={"username": "ada", "password": "other"}).status_code == 400
        asked = {"data": [], "fn_index": 0, "session_hash": "s"}
        assert client.get("/config").status_code == client.post("/gradio_api/queue/join", json=asked).status_code == 401
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert client.get("/gradio_api/file=x").status_code == 401
        assert client.post("/login", data={"username": "bob", "password": "other"}).status_code == 200
        answer = client.get("/config")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    page.close()


@pytest.fixture
def slow(chat, monkeypatch):
    """The page in this process, on an engine that takes its time and does not end by itself."""
    engine = Engine(replace(chat))
    vars(engine.chat)["stop_token_ids"] = frozenset()
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda: (time.sleep(0.03), step()))
    page = web.serve_page(engine, port=free_port(), block=False)
    yield engine, page.local_url
    page.close()
    engine.close()


def long_answer(page) -> None:
    """Ask for one that goes on, of words by chance."""
    page.check("#do_sample input")
    page.fill("#temperature input[type=number]", "2")
    page.press("#temperature input[type=number]", "Tab")
    page.fill(BOX, "Tell me a long story.")
    page.press(BOX, "Enter")


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_browser
def test_streaming_stop_and_a_closed_tab(slow, visit):
    engine, url = slow
    page = visit(url)
    long_answer(page)
    page.wait_for_selector("#box .stop-button")
    seen = set()
    until(lambda: seen.add(page.evaluate(LAST)) or len(seen) >= 6)
    by_length = sorted(seen - {"…"}, key=len)
    assert all(longer.startswith(shorter[:5]) for shorter, longer in pairwise(by_length))
    assert page.locator("#undo[disabled]").count() == 1
    page.click("#box .stop-button")
    stopped = answered(page, 1)
    until(lambda: engine.load == (0, 0), 5)
    assert stopped.startswith(by_length[-1][:5])
    page.wait_for_timeout(300)
    assert page.evaluate(LAST) == stopped

    other = visit(url)
    long_answer(other)
    other.wait_for_selector("#box .stop-button")
    until(lambda: engine.load == (1, 0))
    other.context.close()
    until(lambda: engine.load == (0, 0), 8)


def test_a_tab_copies_to_a_fresh_one_and_counts_pictures(engine, scene):
    tab = Tab(engine, "zh", 7)
    tab.ask("图里有什么？", [str(scene(6))])
    assert [m["role"] for m in tab.messages()] == ["user", "assistant"]
    answer = "".join(tab.pieces())
    assert tab.messages()[1]["content"] == [{"type": "text", "text": answer}]
    fresh = copy.deepcopy(tab)
    assert fresh.session.engine is engine and fresh.messages() == [] and (fresh.lang, fresh.session.seed) == ("zh", 7)
    with pytest.raises(web.ChatError, match=str(MAX_PICTURES)):
        tab.ask("?", [str(scene(6))] * MAX_PICTURES)
    with pytest.raises(web.ChatError, match="请先输入问题"):
        tab.ask(" ", [])


def test_all_is_said_in_both_languages():
    assert all(en and zh for en, zh in TEXT.values())
    assert [zh for en, zh in TEXT.values() if en == zh] == ["Top-p", "Top-k"]
    assert all((web.ASSETS / "shapes" / "pictures" / name).is_file() for name, *_ in EXAMPLES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--auth", "sesame:"], "USER:PASSWORD"), (["--max-batch", "0"], "--max-batch"), (["--port", "70000"], "--port")],
)
def test_wrong_flags_are_told_without_the_password(flags, message, capsys):
    from lavis.cli import main

    assert main(["web", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "sesame" not in error


@needs_browser
def test_the_page_answers_as_the_session_does(url, visit, scene, engine):
    session = ChatSession(engine)
    session.attach(read_picture(scene(1).read_bytes()))
    questions = ("图里有什么？", "图形是什么颜色？")
    expected = ["".join(session.ask(q)) for q in questions]
    page = visit(url, "zh-CN")
    upload(page, scene(1))
    assert [ask(page, q) for q in questions] == expected
    page.evaluate(
        "() => new MutationObserver(() => { window.regenerated = true }).observe(document.querySelector('#regenerate'),"
        " {attributes: true})"
    )
    page.click("#regenerate")
    page.wait_for_function("() => window.regenerated")
    assert answered(page, 2) == expected[1]

    page.click("#undo")
    page.wait_for_function("([box, q]) => document.querySelector(box).value == q", arg=[BOX, questions[1]])
    assert page.locator(BOT).count() == 1
    page.fill(BOX, "")
    page.click("#clear")
    page.wait_for_selector("#kept img")
    assert page.locator(BOT).count() == 0
    assert ask(page, questions[0]) == expected[0]  # about the picture that stayed
    page.wait_for_selector("#kept", state="hidden")
    page.click("#restart")
    page.wait_for_selector("#chat .example")
    assert page.locator("#kept img").count() == page.locator(BOT).count() == 0


@needs_browser
def test_settings_are_used_and_restart_resets_them(url, visit, scene, engine):
    page = visit(url)
    upload(page, scene(2), scene(3))
    page.fill("#max_new_tokens input[type=number]", "2")
    page.press("#max_new_tokens input[type=number]", "Tab")
    session = ChatSession(engine, engine.chat.defaults.with_values({"max_new_tokens": 2}))
    session.attach(*(read_picture(scene(n).read_bytes()) for n in (2, 3)))
    assert ask(page, "What is in the picture?") == "".join(session.ask("What is in the picture?"))
    assert page.locator("#chat .user.message img").count() == 2
    page.fill("#seed input", "")
    page.fill(BOX, "What?")
    page.press(BOX, "Enter")
    page.wait_for_selector(".toast-body:has-text('seed')")
    page.click("#restart")
    page.wait_for_function("() => document.querySelector('#seed input').value == '42'")
    assert page.input_value("#max_new_tokens input[type=number]") == "512"


@needs_browser
def test_two_users_see_nothing_of_each_other(url, visit, scene):
    one, two = visit(url), visit(url, "zh-CN")
    upload(one, scene(4))
    first = ask(one, "What is in the picture?")
    assert two.locator(BOT).count() == 0 and two.locator("#chat .user.message").count() == 0
    upload(two, scene(5))
    second = ask(two, "图里有什么？")
    assert ask(one, "What is in the picture?") and one.locator(BOT).count() == 2
    assert (
        two.locator(BOT).all_inner_texts() == [second]
        and second not in one.inner_text("#chat")
        and first not in two.inner_text("#chat")
    )
    assert one.locator("#chat img").count() == two.locator("#chat img").count() == 1
    two.click("#restart")
    two.wait_for_selector("#chat .example")
    assert one.locator(BOT).count() == 2


@needs_browser
def test_examples_and_language(url, visit):
    page = visit(url)
    page.click("#chat .example >> nth=0")
    assert "stars" in answered(page, 1)
    page.click("#language label:has-text('中文')")
    page.wait_for_selector("#undo:has-text('撤销')")
    shown = page.inner_text("body")
    words = [
        zh
        for key, (_, zh) in TEXT.items()
        if key in ("about", "regenerate", "clear", "settings", "temperature", "do_sample_info", "seed")
    ]
    assert all(word in shown for word in words) and not any(
        en in shown for en in ("Regenerate", "Temperature", "Sampling")
    )
    assert page.locator(BOT).count() == 1  # the conversation stays
    page.click("#restart")
    page.click(f"#chat .example:has-text('{EXAMPLES[0][2]}')")
    assert "星" in answered(page, 1)
    page.reload()
    page.wait_for_selector("html[lang=zh]")  # the choice stays
    page.wait_for_selector("#undo:has-text('撤销')")


@needs_browser
def test_wrong_files_and_html_are_refused_with_a_message(url, visit, scene, tmp_path):
    page = visit(url, "zh-CN")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "fake.png").write_text("hello")
    (tmp_path / "huge.png").write_bytes(bytes(MAX_BYTES + 1))
    for name, message in (("notes.txt", "notes.txt"), ("huge.png", "20")):
        page.set_input_files("#box input[type=file]", tmp_path / name)
        page.wait_for_selector(f".toast-body:has-text('{message}')")
        page.click(".toast-close")
        page.wait_for_selector(".toast-body", state="detached")
    upload(page, tmp_path / "fake.png")
    page.fill(BOX, "图里有什么？")
    page.press(BOX, "Enter")
    page.wait_for_selector(".toast-body:has-text('无法使用该图片：fake.png')")
    assert page.input_value(BOX) == "图里有什么？" and "Traceback" not in page.inner_text("body")
    page.click("#restart")
    page.wait_for_function("box => document.querySelector(box).value == ''", arg=BOX)
    page.click(".toast-close")
    assert visit.errors == []
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.setblocking(False)
        address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
        ask(page, f"![x]({address}) <img src={address}> <iframe src={address}></iframe>")
        page.wait_for_timeout(500)
        with pytest.raises(BlockingIOError):  # nobody has come
            elsewhere.accept()
    visit.errors.clear()  # the browser tells what it refused
    ask(page, "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> **bold**")
    assert page.title() != "owned" and page.locator(f"{USER} strong").count() == 1
    assert page.locator(f"{USER} [onerror], {USER} script").count() == 0
    visit.errors.clear()


def test_only_uploads_can_be_read(url):
    api = f"{url}/gradio_api"
    outside = (
        "/etc/passwd",
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc/passwd",
        str(ROOT / "README.md"),
        "lavis/serve/web.py",
    )
    remote = ("http://example.com/", "HTTPS://example.com/", "%68ttp://example.com/", "file:///etc/passwd")
    for path in (*outside, *remote):
        for route in ("file=", "file/"):
            answer = httpx.get(f"{api}/{route}{path}")
            assert answer.status_code in (403, 404), (route, path, answer.status_code)
    assert httpx.get(f"{api}/proxy=http://example.com/").status_code in (403, 404)
    assert httpx.get(f"{url}/static/../../../../../../etc/passwd").status_code in (403, 404)
    assert httpx.get(f"{url}/openapi.json").status_code == 404
    assert httpx.get(f"{api}/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_forged_upload_is_refused(url):
    """A path that was never uploaded, given where the page gives that of an upload."""
    config = httpx.get(f"{url}/config").json()
    parts = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    asks = next(d for d in config["dependencies"] if [parts["box"], "submit"] in [list(t) for t in d["targets"]])
    values = [
        42 if part == parts["seed"] else next(c["props"].get("value") for c in config["components"] if c["id"] == part)
        for part in asks["inputs"][2:]
    ]
    for forged in ({"path": "/etc/passwd"}, {"path": str(ROOT / "lavis/assets/shapes/pictures/green_stars.png")}):
        box = {"text": "What is it?", "files": [{**forged, "meta": {"_type": "gradio.FileData"}}]}
        body = {"data": [None, box, *values], "fn_index": asks["id"], "session_hash": "forged"}
        assert httpx.post(f"{url}/gradio_api/queue/join", json=body).status_code == 200
        with httpx.stream("GET", f"{url}/gradio_api/queue/data?session_hash=forged", timeout=20) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        done = next(e for e in events if e["msg"] == "process_completed")
        assert not done["success"] and "root:" not in json.dumps(events)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    from lavis.cli import main

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # put back afterwards
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.delitem(sys.modules, "lavis.serve.web")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["web", "--model-type", "shapes", "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'lavis[chat]'" in error and "--auth" in error
