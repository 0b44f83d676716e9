"""One browser tab: its conversation, its language, and the files its pictures came in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from lavis.core.errors import ChatError
from lavis.generation.engine import Engine
from lavis.generation.pictures import Picture, read_picture
from lavis.serve.session import ChatSession, Reply, Turn
from lavis.serve.web_text import LANGUAGES, text

MAX_PICTURES = 32
"""In one conversation."""


class Tab:
    """What one browser tab holds.

    A copy is a fresh tab on the same engine: so Gradio, which copies a first value, gives each its own.
    """

    def __init__(self, engine: Engine, lang: str, seed: int) -> None:
        self.lang, self.seed = lang, seed
        self.session = ChatSession(engine, seed=seed)
        self.busy = threading.Lock()
        """Held while an answer comes."""
        self._files: dict[str, str] = {}
        self._reply: Reply | None = None
        self._asked: Turn | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Tab:
        return Tab(self.session.engine, self.lang, self.seed)

    def say(self, key: str, **values: object) -> str:
        """The words for `key` in this tab's language."""
        return text(key, self.lang).format(**values)

    def speak(self, lang: str) -> None:
        """Change the language, if it is one."""
        self.lang = lang if lang in LANGUAGES else "en"

    def configure(self, values: Mapping[str, Any]) -> None:
        """Use these settings, and `seed`, for the next answer. Raises ChatError for what is out of its limits."""
        seed = values["seed"]
        if not isinstance(seed, int):
            raise ChatError("the seed has to be a whole number.")
        self.session.settings = self.session.engine.chat.defaults.with_values(
            {k: v for k, v in values.items() if k != "seed"}
        )
        self.session.seed = seed

    def ask(self, question: str, files: Sequence[str]) -> None:
        """Ask, with the uploaded `files`; `pieces` gives the answer. Raises ChatError if that can't be asked."""
        if not question.strip():
            raise ChatError(self.say("no_question"))
        if len(files) + len(self.session.pictures) > MAX_PICTURES:
            raise ChatError(self.say("too_many", most=MAX_PICTURES))
        if files and not self.session.engine.chat.sees:
            raise ChatError(self.say("text_only"))
        pictures = [self._read(file) for file in files]
        shown = (*self.session.waiting, *pictures)
        self._reply = self.session.ask(question, pictures)
        self._asked = Turn(question, "", shown)

    def regenerate(self) -> None:
        """Ask the last question again. Raises ChatError if there is none."""
        if not self.session.history:
            raise ChatError(self.say("no_history"))
        turn = self.session.history[-1]
        shown = (*turn.pictures, *self.session.waiting)
        self._reply = self.session.regenerate()
        self._asked = Turn(turn.question, "", shown)

    def undo(self) -> str:
        """Take back the last question, and return it; its pictures wait. Raises ChatError if there is none."""
        if not self.session.history:
            raise ChatError(self.say("no_history"))
        return self.session.undo().question

    def pieces(self) -> Iterator[str]:
        """The answer's pieces. Closing it early ends the answer."""
        assert self._reply is not None
        reply = self._reply
        try:
            with closing(iter(reply)) as pieces:
                yield from pieces
        finally:
            reply.stop()
            self._reply = self._asked = None

    def stop(self) -> None:
        """End the answer that comes, if one does."""
        if reply := self._reply:
            reply.stop()

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as a Chatbot takes it, with the answer so far."""
        turns = list(self.session.history)
        if self._asked and self._reply:
            turns.append(Turn(self._asked.question, self._reply.text or "…", self._asked.pictures))
        messages = []
        for turn in turns:
            content = [{"path": file} for file in self._shown(turn.pictures)]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            messages.append(
                {"role": "assistant", "content": [{"type": "text", "text": turn.answer or self.say("no_answer")}]}
            )
        return messages

    def kept(self) -> list[str]:
        """Files of the pictures that the next question will be about."""
        return self._shown(self.session.waiting)

    def _shown(self, pictures: Sequence[Picture]) -> list[str]:
        """Their files, but for those that were tidied away."""
        return [file for p in pictures if Path(file := self._files[p.key]).is_file()]

    def _read(self, file: str) -> Picture:
        try:
            picture = read_picture(Path(file).read_bytes(), Path(file).name)
        except ChatError as e:
            raise ChatError(self.say("bad_picture", why=e)) from e
        self._files[picture.key] = file
        return self.session.engine.chat.compact(picture)
