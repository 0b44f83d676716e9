"""What is typed: lines with editing, history and completion, and the paths in them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from lavis.core.errors import ChatError
from lavis.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings

COLONS = (":", "\uff1a")
"""A command begins with one of these; the second is what Chinese input methods type."""
SEPARATORS = ",\uff0c"
LAST_WORD = re.compile(rf"(?:\\.|[^\s{SEPARATORS}])*$")
CHOICES = {"conf": [f"{field.name}=" for field in fields(GenerationSettings)], "lang": ["en", "zh"]}
"""What may follow a command, where it is not a path."""
PATHS = ("img", "save", "load")


def split_paths(text: str, open_quote: str = "a quotation mark is not closed: {text}") -> list[str]:
    """The paths in `text`, between spaces or commas, quoted as for a shell; a name with spaces needs no quotes if the
    file is there.

    Raises ChatError if a quotation mark is not closed.
    """
    text = text.strip()
    try:
        if text and Path(text).expanduser().is_file():
            return [text]
    except (OSError, ValueError):  # no name of a file, such as a very long one
        pass
    words = shlex.shlex(text, posix=True)
    words.whitespace += SEPARATORS
    words.whitespace_split, words.commenters = True, ""
    try:
        return list(words)
    except ValueError as error:
        raise ChatError(open_quote.format(text=text)) from error


def history_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where typed lines are kept, readable by their owner alone; None if nothing can be written there."""
    root = environment.get("XDG_CACHE_HOME") or "~/.cache"
    file = Path(root).expanduser() / "lavis" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        return file if os.access(file, os.W_OK) else None
    except OSError:
        return None


def completions(line: str, commands: Mapping[str, str], *, paths: bool = False) -> Iterable[tuple[str, int, str]]:
    """What may stand at the end of `line`: (text, how many characters it replaces, what it means).

    commands: name without colon to its meaning. paths: whether the line names files, as the first one does.
    """
    colon, rest = line[:1], line[1:]
    name, space, argument = rest.partition(" ")
    if colon in COLONS and not space:
        for known in (known for known in commands if known.startswith(name)):
            yield f":{known}" + " " * (known in PATHS or known in CHOICES), len(line), commands[known]
    elif colon in COLONS and name in CHOICES:
        word = _last_word(argument)
        setting, equals, value = word.partition("=")
        values = ("true", "false") if equals and setting == "do_sample" else ()
        words = (
            [f"{setting}={v}" for v in values if v.startswith(value)]
            if equals
            else [w for w in CHOICES[name] if w.startswith(word)]
        )
        yield from ((w, len(word), "") for w in words)
    elif paths or (colon in COLONS and name in PATHS):
        yield from _files(_last_word(line if paths else argument))


def _last_word(line: str) -> str:
    match = LAST_WORD.search(line)
    return match[0] if match else ""


def _files(word: str) -> Iterable[tuple[str, int, str]]:
    typed = re.sub(r"\\(.)", r"\1", word)
    folder, _, start = typed.rpartition("/")
    try:
        entries = sorted(
            Path(f"{folder}/" if "/" in typed else ".").expanduser().iterdir(), key=lambda entry: entry.name
        )
    except (OSError, RuntimeError):
        return
    for entry in entries:
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            name = typed[: len(typed) - len(start)] + entry.name + "/" * entry.is_dir()
            yield re.sub(rf"([\s{SEPARATORS}\\\"'])", r"\\\1", name), len(word), ""


class Keyboard:
    """Asks for lines on a terminal. Raises ChatError if prompt_toolkit is not installed."""

    def __init__(self) -> None:
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.history import FileHistory, InMemoryHistory
            from prompt_toolkit.output import create_output
        except ImportError as error:
            raise ChatError(
                "a conversation in the terminal needs prompt_toolkit: pip install 'lavis[chat]', or pipe the"
                " questions in."
            ) from error
        file = history_file()
        self._lines: PromptSession[str] = PromptSession(
            history=FileHistory(str(file)) if file else InMemoryHistory(),
            output=create_output(always_prefer_tty=True),
            key_bindings=_keys(),
            complete_while_typing=False,
        )

    def ask(self, prompt: str, commands: Mapping[str, str], *, paths: bool = False) -> str:
        """A line, or several that were pasted; `commands` and `paths` as for `completions`. Ctrl-C empties it.

        Raises EOFError on Ctrl-D.
        """
        completer = _completer(commands, paths=paths)
        while True:
            try:
                return self._lines.prompt([("bold ansigreen", prompt)], completer=completer)
            except KeyboardInterrupt:
                continue


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def _completer(commands: Mapping[str, str], *, paths: bool) -> Completer:
    from prompt_toolkit.completion import Completer, Completion

    class Line(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            for text, length, meaning in completions(document.text_before_cursor, commands, paths=paths):
                yield Completion(text, -length, display=text.strip(), display_meta=meaning)

    return Line()
