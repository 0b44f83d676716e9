"""The web page: pictures and questions in, streamed answers out, for many users at once, in English and Chinese.

Gradio draws it. Everything comes from this server: system fonts, no analytics, and no file but uploads of its users and
its examples.
"""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import gradio as gr
from starlette.middleware import Middleware

from lavis.core.errors import ChatError, ConfigError
from lavis.generation.engine import Engine
from lavis.generation.pictures import MAX_BYTES, SUFFIXES
from lavis.generation.settings import LIMITS
from lavis.serve.web_frame import HereOnly, theme
from lavis.serve.web_tab import Tab
from lavis.serve.web_text import EXAMPLES, LANGUAGES, text

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
LATEX = [("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False)]
SECONDS_PER_UPDATE = 0.05
"""Pieces of an answer that come sooner are shown together."""
KEEP_UPLOADS = 7 * 24 * 3600

FIND_LANGUAGE = """(state, language) => {
  const chosen = localStorage.getItem("lavis-language") || FIXED || (navigator.language.startsWith("zh") ? "zh" : "en");
  document.documentElement.lang = chosen;
  return [state, chosen];
}"""
KEEP_LANGUAGE = """(state, language) => {
  localStorage.setItem("lavis-language", language);
  document.documentElement.lang = language;
  return [state, language];
}"""
GRADIO_LANGUAGE = """<script>(() => {
  const chosen = localStorage.getItem("lavis-language") || FIXED;
  if (chosen) Object.defineProperty(navigator, "language", {get: () => chosen});
})()</script>"""
"""Gradio's own few words follow navigator.language."""


def build_page(engine: Engine, *, lang: str = "auto", seed: int = 42) -> gr.Blocks:
    """The page that chats with `engine`'s model. lang: en, zh, or auto, which is the browser's."""
    return _Page(engine, lang, seed).blocks


def serve_page(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    lang: str = "auto",
    seed: int = 42,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page; with `block` until Ctrl-C. share: also through a public link. auth: (user, password) of those who
    may enter.

    Raises ConfigError if the port is taken.
    """
    page = build_page(engine, lang=lang, seed=seed)
    try:
        _, url, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth or None,
            max_file_size=MAX_BYTES,
            max_threads=max(40, engine.max_batch + 16),
            state_session_capacity=1000,
            app_kwargs={
                "middleware": [Middleware(HereOnly)],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme(),
            css_paths=ASSETS / "chat" / "web.css",
            head=_with_language(GRADIO_LANGUAGE, lang),
        )
    except OSError as e:
        raise ConfigError(f"the page can't listen on {host}:{port} ({e}): give another --port.") from e
    print(f"Open {url}" + (f" or, from anywhere, {public}" if public else "") + ". Ctrl-C ends it.", flush=True)
    if block:
        page.block_thread()
    return page


class _Page:
    """The page's parts and what they do. What a user has said is in `state` alone, never here."""

    def __init__(self, engine: Engine, lang: str, seed: int) -> None:
        self.engine, self.lang, self.seed = engine, lang, seed
        self.first = lang if lang in LANGUAGES else "en"
        self.words: list[tuple[gr.Component, dict[str, str]]] = []
        """Parts with words: property to the key of its text."""
        with gr.Blocks(
            title=f"{engine.chat.name} · lavis", analytics_enabled=False, delete_cache=(3600, KEEP_UPLOADS)
        ) as self.blocks:
            self.state = gr.State(Tab(engine, self.first, seed))
            self._lay_out()
            self._wire()
        self.blocks.queue(max_size=engine.max_waiting, default_concurrency_limit=engine.max_batch, api_open=False)

    # ---- parts

    def _lay_out(self) -> None:
        with gr.Row(elem_id="top"):
            self.title = gr.Markdown(self._heading(self.first), elem_id="title")
            self.language = gr.Radio(
                [("English", "en"), ("中文", "zh")],
                value=self.first,
                show_label=False,
                container=False,
                elem_id="language",
                scale=0,
            )
        with gr.Row():
            with gr.Column(scale=3, min_width=420, elem_id="talk"):
                self._lay_out_chat()
            with gr.Column(scale=1, min_width=300):
                panel = self._said(gr.Accordion, label="settings", elem_id="settings")
                with panel:
                    self.controls = self._controls()

    def _lay_out_chat(self) -> None:
        sees = self.engine.chat.sees
        self.chat = self._said(
            gr.Chatbot,
            label="chat",
            placeholder="empty" if sees else "empty_text",
            examples=self._examples(self.first),
            elem_id="chat",
            show_label=False,
            layout="bubble",
            buttons=["copy"],
            sanitize_html=True,
            allow_tags=False,
            allow_file_downloads=False,
            latex_delimiters=[{"left": left, "right": right, "display": display} for left, right, display in LATEX],
        )
        self.kept = self._said(
            gr.Gallery,
            label="kept",
            elem_id="kept",
            visible=False,
            columns=8,
            fit_columns=False,
            height=124,
            interactive=False,
            allow_preview=False,
            buttons=[],
            object_fit="contain",
        )
        self.box = self._said(
            gr.MultimodalTextbox,
            placeholder="box" if sees else "box_text",
            file_types=list(SUFFIXES),
            file_count="multiple",
            sources=["upload"] if sees else [],
            show_label=False,
            autofocus=True,
            max_lines=6,
            max_plain_text_length=20_000,
            elem_id="box",
        )
        with gr.Row(elem_id="actions"):
            self.buttons = {
                key: self._said(gr.Button, value=key, size="sm", elem_id=key)
                for key in ("regenerate", "undo", "clear", "restart")
            }

    def _controls(self) -> dict[str, gr.Component]:
        """The settings, at the model's defaults, within LIMITS; the sliders end where values stop making sense."""
        values = self._defaults()
        tokens = min(LIMITS["max_new_tokens"][1], self.engine.chat.window)

        def slider(name: str, most: float, step: float) -> gr.Slider:
            least, limit = LIMITS[name]
            return self._said(
                gr.Slider,
                label=name,
                minimum=least,
                maximum=min(most, limit),
                step=step,
                value=values[name],
                elem_id=name,
            )

        def number(name: str, least: float, most: float) -> gr.Number:
            return self._said(
                gr.Number,
                label=name,
                minimum=least,
                maximum=most,
                precision=0,
                value=values[name],
                elem_id=name,
                min_width=120,
            )

        return {
            "do_sample": self._said(
                gr.Checkbox, label="do_sample", info="do_sample_info", value=values["do_sample"], elem_id="do_sample"
            ),
            "temperature": slider("temperature", max(2, values["temperature"]), 0.01),
            "top_p": slider("top_p", 1, 0.01),
            "top_k": number("top_k", *LIMITS["top_k"]),
            "num_beams": slider("num_beams", 10, 1),
            "repetition_penalty": slider("repetition_penalty", max(2, values["repetition_penalty"]), 0.01),
            "max_new_tokens": slider("max_new_tokens", tokens, 1),
            "seed": number("seed", 0, 2**53 - 1),
        }

    def _defaults(self) -> dict[str, Any]:
        defaults = self.engine.chat.defaults
        return asdict(defaults) | {
            "max_new_tokens": min(defaults.max_new_tokens, self.engine.chat.window),
            "seed": self.seed,
        }

    # ---- words

    def _said(self, kind: Callable[..., Any], **arguments: Any) -> Any:
        """A part; arguments that are keys of texts become texts, and change with the language."""
        keys = {
            name: key
            for name, key in arguments.items()
            if name in ("label", "info", "placeholder") or (kind is gr.Button and name == "value")
        }
        part = kind(**arguments | {name: text(key, self.first) for name, key in keys.items()})
        self.words.append((part, keys))
        return part

    def _heading(self, lang: str) -> str:
        about = text("about" if self.engine.chat.sees else "text_only", lang)
        return f"# lavis <code>{html.escape(self.engine.chat.name)}</code>\n{about}"

    def _examples(self, lang: str) -> list[dict[str, Any]]:
        if not self.engine.chat.sees:
            return []
        folder = ASSETS / "shapes" / "pictures"
        return [{"text": questions[LANGUAGES.index(lang)], "icon": str(folder / name)} for name, *questions in EXAMPLES]

    def _speak(self, tab: Tab, lang: str) -> dict[gr.Component, Any]:
        """All words in `lang`."""
        tab.speak(lang)
        said = {
            part: gr.update(**cast(dict[str, Any], {name: text(key, tab.lang) for name, key in keys.items()}))
            for part, keys in self.words
        }
        said[self.chat].update(examples=self._examples(tab.lang), value=tab.messages())
        return said | {self.title: self._heading(tab.lang), self.language: tab.lang, self.state: tab}

    # ---- what happens

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        here = [self.chat, self.kept, self.box, *self.buttons.values()]
        everything = [*(part for part, _ in self.words), self.title, self.language, self.state]
        answering = {
            "outputs": here,
            "concurrency_id": "answers",
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": self.box,
        }
        settings = list(self.controls.values())
        language = [self.state, self.language]
        self.blocks.load(self._speak, language, everything, js=_with_language(FIND_LANGUAGE, self.lang), **hidden)
        self.language.input(self._speak, language, everything, js=KEEP_LANGUAGE, **hidden)
        self.box.submit(self._ask, [self.state, self.box, *settings], **answering)
        self.chat.example_select(self._ask_example, [self.state, *settings], **answering)
        self.buttons["regenerate"].click(self._regenerate, [self.state, *settings], **answering)
        self.chat.clear(self._clear, self.state, here, queue=False, **hidden)
        self.box.stop(Tab.stop, self.state, None, queue=False, **hidden)
        self.buttons["undo"].click(self._undo, self.state, here, queue=False, **hidden)
        self.buttons["clear"].click(self._clear, self.state, here, queue=False, **hidden)
        self.buttons["restart"].click(self._restart, self.state, [*here, *settings], queue=False, **hidden)

    def _ask(self, tab: Tab, message: dict[str, Any], *values: Any) -> Iterator[dict[gr.Component, Any]]:
        yield from self._answer(tab, lambda: tab.ask(message["text"] or "", message["files"] or []), values)

    def _ask_example(self, tab: Tab, chosen: gr.SelectData, *values: Any) -> Iterator[dict[gr.Component, Any]]:
        name, *questions = EXAMPLES[int(chosen.index)]
        file = str(ASSETS / "shapes" / "pictures" / name)
        yield from self._answer(tab, lambda: tab.ask(questions[LANGUAGES.index(tab.lang)], [file]), values)

    def _regenerate(self, tab: Tab, *values: Any) -> Iterator[dict[gr.Component, Any]]:
        yield from self._answer(tab, tab.regenerate, values)

    def _answer(
        self, tab: Tab, begin: Callable[[], None], values: tuple[Any, ...]
    ) -> Iterator[dict[gr.Component, Any]]:
        """Show an answer while it comes. Whatever fails becomes a message in the page."""
        if not tab.busy.acquire(blocking=False):
            _warn(tab, tab.say("busy"))
            yield {self.box: gr.skip()}
            return
        try:
            tab.configure(dict(zip(self.controls, values, strict=True)))
            begin()
            yield self._view(tab, answering=True)
            shown = time.monotonic()
            for _ in tab.pieces():
                if time.monotonic() - shown >= SECONDS_PER_UPDATE:
                    yield {self.chat: tab.messages()}
                    shown = time.monotonic()
            yield self._view(tab)
        except Exception as e:  # noqa: BLE001 - a user of a page sees no traceback
            _warn(tab, e)
            yield self._view(tab)
        finally:
            tab.busy.release()

    def _undo(self, tab: Tab) -> dict[gr.Component, Any]:
        return self._change(tab, tab.undo)

    def _clear(self, tab: Tab) -> dict[gr.Component, Any]:
        return self._change(tab, tab.session.clear_history)

    def _restart(self, tab: Tab) -> dict[gr.Component, Any]:
        view = self._change(tab, tab.session.reset)
        defaults = self._defaults()
        return view | {self.box: gr.update(value=None)} | {part: defaults[name] for name, part in self.controls.items()}

    def _change(self, tab: Tab, change: Callable[[], str | None]) -> dict[gr.Component, Any]:
        """Change the conversation where no answer comes; a question taken back goes to the text box."""
        question = None
        with tab.busy:
            try:
                question = change()
            except ChatError as e:
                _warn(tab, e)
            view = self._view(tab)
        return view | ({self.box: {"text": question, "files": []}} if question else {})

    def _view(self, tab: Tab, *, answering: bool = False) -> dict[gr.Component, Any]:
        """Conversation, pictures that wait, and what can be pressed."""
        kept = tab.kept()
        box = gr.update(submit_btn=not answering, stop_btn=answering)
        if answering:
            box["value"] = None
        view = {self.chat: tab.messages(), self.kept: gr.update(value=kept, visible=bool(kept)), self.box: box}
        return view | {button: gr.update(interactive=not answering) for button in self.buttons.values()}


def _with_language(script: str, lang: str) -> str:
    return script.replace("FIXED", f'"{lang}"' if lang in LANGUAGES else '""')


def _warn(tab: Tab, error: Exception | str) -> None:
    """Show a message in the page, as text."""
    if isinstance(error, Exception) and not isinstance(error, ChatError):
        log.error("the page failed", exc_info=error)
        error = tab.say("failed")
    gr.Warning(html.escape(str(error)))
