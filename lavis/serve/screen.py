"""What the terminal shows: answers as they come, notes beside them, previews of pictures."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.markdown import Heading, Markdown
from rich.segment import Segment, SegmentLines
from rich.text import Text

if TYPE_CHECKING:
    from lavis.serve.session import Reply

COLUMNS, ROWS = 40, 12
"""Largest preview, in cells of the terminal."""
PREVIEW_PIXELS = 480
REFRESH = 10
"""Times a second that an answer on its way is drawn."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Everything that moves the cursor, talks to the terminal or reverses the order of what is read."""
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
"""HTML is shown as it is written."""


def harmless(text: str) -> str:
    """`text` without control characters, newline and tab excepted: no model's answer and no file's name writes to the
    terminal's controls.
    """
    return CONTROL.sub("", text)


def closed_length(text: str) -> int:
    """How many characters of Markdown `text` are blocks that nothing which follows can change: all but the last one."""
    starts = [token.map[0] for token in MARKDOWN.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]])


class Screen:
    """Answers go to stdout; what is said about them goes there as well on a terminal, else to stderr.

    interactive: whether someone types at the terminal. markdown: whether answers are typeset; never when stdout is no
    terminal.
    """

    def __init__(self, *, interactive: bool = True, markdown: bool = True) -> None:
        self.interactive, self.answers = interactive, Console(highlight=False)
        self.on_terminal = interactive and self.answers.is_terminal
        self.notes = self.answers if self.on_terminal else Console(stderr=True, highlight=False)
        self.markdown = markdown and self.on_terminal

    def note(self, text: str, style: str = "dim") -> None:
        """A line or more about the conversation."""
        self.notes.print(Text(harmless(text), style=style), soft_wrap=True)

    def clear(self) -> None:
        if self.on_terminal:
            self.answers.clear()

    def stream(self, reply: Reply, thinking: str = "") -> None:
        """Show the answer while it comes. On Ctrl-C what has come stays, and KeyboardInterrupt is raised."""
        quiet = _silent_keyboard() if self.interactive else nullcontext()
        with _ctrl_c_ends(reply), closing(iter(reply)) as pieces, quiet:
            if self.markdown:
                self._typeset(pieces, thinking)
            else:
                self._plain(pieces)

    def _plain(self, pieces: Iterator[str]) -> None:
        try:
            for piece in pieces:
                sys.stdout.write(harmless(piece))
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _typeset(self, pieces: Iterator[str], thinking: str) -> None:
        """Blocks that are whole are printed for good; the last one is redrawn with each piece, its end only if it is
        higher than the screen.
        """
        text, drawn = "", 0.0
        try:
            with self.answers.status(Text(thinking, style="dim")):
                text = harmless(next(pieces, ""))
            # drawn by this thread alone: rich's own would write between the lines that are printed for good
            with Live(console=self.answers, auto_refresh=False, transient=True) as live:
                for piece in pieces:
                    text += harmless(piece)
                    if "\n" in piece and (n := closed_length(text)):
                        live.update(Text())
                        self._block(text[:n])
                        text, drawn = text[n:], 0.0
                    if time.monotonic() - drawn > 1 / REFRESH:
                        live.update(self._tail(text), refresh=True)
                        drawn = time.monotonic()
        finally:
            self._block(text)

    def _block(self, text: str) -> None:
        if text.strip():
            self.answers.print(SegmentLines([*self._lines(text), []], new_lines=True), end="")

    def _tail(self, text: str) -> SegmentLines:
        return SegmentLines(self._lines(text)[-max(1, self.answers.height - 2) :], new_lines=True)

    def _lines(self, text: str) -> list[list[Segment]]:
        """Typeset, without empty lines at the ends.

        The last column stays free: a line that fills it may wrap, and then too little is erased.
        """
        options = self.answers.options.update(width=self.answers.width - 1)
        lines = self.answers.render_lines(_markdown(text), options, pad=False)
        full = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        return lines[full[0] : full[-1] + 1] if full else []

    def preview(self, image: Image.Image) -> None:
        """The picture in small, where the terminal can show one."""
        if self.on_terminal and (shown := preview(image, os.environ)):
            self.answers.file.write(shown + "\n")
            self.answers.file.flush()


@contextmanager
def _silent_keyboard() -> Iterator[None]:
    """What is typed meanwhile is not shown: it would stand in the middle of the answer. The next prompt gets it."""
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = termios.tcgetattr(sys.stdin)
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class _Heading(Heading):
    LEVEL_ALIGN = {}  # noqa: RUF012 - as in rich, but none is centred


class _Markdown(Markdown):
    elements = {**Markdown.elements, "heading_open": _Heading}  # noqa: RUF012


def _markdown(text: str) -> Markdown:
    shown = _Markdown(text, hyperlinks=False, code_theme="ansi_dark")
    shown.parsed = MARKDOWN.parse(text)
    for token in shown.parsed:
        for part in token.children or []:
            if part.type == "softbreak":  # a model's new line is meant
                part.type = "hardbreak"
    return shown


def preview(image: Image.Image, environment: Mapping[str, str]) -> str:
    """What makes the terminal that `environment` describes show `image`: the protocol of kitty or of iTerm2, coloured
    half blocks, or nothing.
    """
    columns = max(1, min(COLUMNS, round(2 * ROWS * image.width / image.height)))
    term = environment.get("TERM", "")
    if not term.startswith(("tmux", "screen")):  # these swallow the pictures of the terminal around them
        if term == "xterm-kitty" or "KITTY_WINDOW_ID" in environment:
            return _kitty(_png(image), columns)
        if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
            return f"\033]1337;File=inline=1;width={columns};preserveAspectRatio=1:{_png(image)}\a"
    if environment.get("COLORTERM") in ("truecolor", "24bit"):
        return _half_blocks(image, columns)
    return ""


def _png(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _kitty(data: str, columns: int) -> str:
    chunks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    keys = [f"a=T,f=100,c={columns},q=2,", *[""] * (len(chunks) - 1)]
    return "".join(
        f"\033_G{k}m={int(i < len(chunks) - 1)};{c}\033\\" for i, (k, c) in enumerate(zip(keys, chunks, strict=True))
    )


def _half_blocks(image: Image.Image, columns: int) -> str:
    """A cell is an upper half in the foreground's colour above a lower one in the background's."""
    rows = min(ROWS, max(1, round(columns * image.height / image.width / 2)))
    pixels: Any = image.resize((columns, 2 * rows), Image.Resampling.BOX).load()
    lines = []
    for y in range(0, 2 * rows, 2):
        pairs = ((pixels[x, y], pixels[x, y + 1]) for x in range(columns))
        lines.append(
            "".join("\033[38;2;{};{};{};48;2;{};{};{}m▀".format(*upper, *lower) for upper, lower in pairs) + "\033[0m"
        )
    return "\n".join(lines)


@contextmanager
def _ctrl_c_ends(reply: Reply) -> Iterator[None]:
    """Ctrl-C ends the answer, and KeyboardInterrupt is raised when all is drawn: raised in the middle it can be lost in
    a destructor. Pressed again, at once.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    pressed = False

    def stop(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        reply.answer.leave()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
