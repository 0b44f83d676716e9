"""One conversation: pictures and history in, streamed text out."""

from __future__ import annotations

import base64
import bisect
import json
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lavis.core.errors import ChatError
from lavis.core.json_file import read_json
from lavis.core.types import Message
from lavis.generation.engine import Answer, Engine
from lavis.generation.model import Prompt, user_message
from lavis.generation.pictures import Picture, read_picture
from lavis.generation.settings import GenerationSettings
from lavis.serve.text import TextStream


@dataclass(frozen=True)
class Turn:
    """A question with its pictures, and the answer."""

    question: str
    answer: str
    pictures: tuple[Picture, ...] = ()


_State = tuple[tuple[Turn, ...], tuple[Picture, ...]]
"""History, and pictures that wait."""


class Reply:
    """An answer's text in pieces, as it comes; after the last one it is in the session's history.

    Leaving the loop early, or `stop`, ends the answer; what had come by then is kept. Where nothing had, `restore`
    makes the session what it was.
    """

    def __init__(self, session: ChatSession, asked: Turn, answer: Answer, restore: Callable[[], None]) -> None:
        self.answer = answer
        self._session, self._asked, self._restore = session, asked, restore
        self._stream = TextStream(session.engine.chat.tokenizer)
        self._pieces = self._read()
        self._begun = False

    @property
    def text(self) -> str:
        """What has come."""
        return self._stream.text

    def stop(self) -> None:
        """End the answer; the loop over the pieces ends soon."""
        self.answer.cancel()
        if not self._begun:
            self._restore()
            self._begun = True

    def __iter__(self) -> Generator[str, None, None]:
        return self._pieces

    def _read(self) -> Generator[str, None, None]:
        if self._begun:  # stopped before anyone listened
            return
        self._begun = True
        try:
            for token in self.answer:
                if piece := self._stream.add(token):
                    yield piece
            if piece := self._stream.finish():
                yield piece
        except BaseException:  # Ctrl-C, or the reader has gone
            self.answer.cancel()
            self._stream.finish()
            raise
        finally:
            if self.text or self.answer.finish_reason in ("stop", "length"):
                self._session.history.append(replace(self._asked, answer=self.text))
            else:
                self._restore()


@dataclass
class ChatSession:
    """A conversation on `engine`. Not for several threads at once; many sessions may share an engine.

    settings: of the next answers; default those that suit the model. seed: with it, the same questions get the same
    drawn answers.
    """

    engine: Engine
    settings: GenerationSettings | None = None
    seed: int = 42
    history: list[Turn] = field(default_factory=list)
    waiting: list[Picture] = field(default_factory=list)
    """Pictures that the next question will be about."""
    _attempt: int = 0

    def __post_init__(self) -> None:
        self.settings = self.settings or self.engine.chat.defaults

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, oldest first."""
        return [p for turn in self.history for p in turn.pictures] + self.waiting

    def attach(self, *pictures: Picture) -> None:
        """Show pictures together with the next question. Raises ChatError if the model reads text only."""
        if pictures and not self.engine.chat.sees:
            raise ChatError(f"{self.engine.chat.name} reads text only: it can't be shown images.")
        self.waiting.extend(map(self.engine.chat.prepared, pictures))

    def ask(self, question: str, pictures: Sequence[Picture] = ()) -> Reply:
        """Ask about what is attached and what was said.

        Raises ChatError if the question is empty or too long for the model's window.
        """
        if not question.strip():
            raise ChatError("ask something.")
        before = self._state()
        self.attach(*pictures)
        return self._ask(question, before, self._state())

    def regenerate(self) -> Reply:
        """Ask the last question again; a drawn answer will be another one. The old answer stays if no new one comes.

        Raises ChatError if there is none.
        """
        before = self._state()
        turn = self.undo()
        self._attempt += 1
        return self._ask(turn.question, before, before)

    def _ask(self, question: str, if_refused: _State, if_nothing_comes: _State) -> Reply:
        settings, shown = self.settings or self.engine.chat.defaults, tuple(self.waiting)
        try:
            prompt = self._prompt(question, shown, settings)
            answer = self.engine.submit(prompt, settings, seed=self._answer_seed())
        except BaseException:
            self._return_to(if_refused)
            raise
        self.waiting = []
        return Reply(self, Turn(question, "", shown), answer, lambda: self._return_to(if_nothing_comes))

    def _state(self) -> _State:
        return tuple(self.history), tuple(self.waiting)

    def _return_to(self, state: _State) -> None:
        history, waiting = state
        self.history, self.waiting = list(history), list(waiting)

    def undo(self) -> Turn:
        """Take back the last question and its answer; its pictures wait for the next.

        Raises ChatError if there is none.
        """
        if not self.history:
            raise ChatError("nothing has been asked yet.")
        turn = self.history.pop()
        self.waiting[:0] = turn.pictures
        return turn

    def clear_history(self) -> None:
        """Forget what was said; the pictures stay."""
        self.waiting, self.history, self._attempt = self.pictures, [], 0

    def reset(self) -> None:
        """Forget everything but the settings."""
        self.waiting, self.history, self._attempt = [], [], 0

    def save(self, path: str | Path) -> None:
        """Write the conversation with its pictures and settings as JSON."""
        turns = [
            {"question": t.question, "answer": t.answer, "pictures": [_packed(p) for p in t.pictures]}
            for t in self.history
        ]
        settings = asdict(self.settings) if self.settings else {}
        content = {
            "seed": self.seed,
            "settings": settings,
            "history": turns,
            "pictures": [_packed(p) for p in self.waiting],
        }
        try:
            Path(path).expanduser().write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise ChatError(f"the conversation can't be written to {path}: {error}.") from error

    def load(self, path: str | Path) -> None:
        """Go on with what `save` wrote. Raises ChatError, and changes nothing, if the file holds something else."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise ChatError(f"there is no file {path}.")
        content = read_json(file)
        try:
            history = [
                Turn(str(t["question"]), str(t["answer"]), tuple(map(_unpacked, t["pictures"])))
                for t in content["history"]
            ]
            waiting, seed = [_unpacked(p) for p in content["pictures"]], int(content["seed"])
            settings = GenerationSettings().with_values(content["settings"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ChatError(f"{path} holds no saved conversation ({type(error).__name__}: {error}).") from error
        self.history, self.waiting, self.seed, self.settings, self._attempt = history, waiting, seed, settings, 0

    def _prompt(self, question: str, pictures: tuple[Picture, ...], settings: GenerationSettings) -> Prompt:
        """The whole conversation; where that leaves too little room for an answer, without the oldest turns that show
        no picture.
        """
        chat = self.engine.chat
        room = chat.window - min(settings.max_new_tokens, chat.window // 4)
        blind = [i for i, turn in enumerate(self.history) if not turn.pictures]

        def without(dropped: int) -> Prompt:
            left_out = set(blind[:dropped])
            turns = [turn for i, turn in enumerate(self.history) if i not in left_out]
            messages = [
                m
                for turn in turns
                for m in (user_message(turn.question, turn.pictures), Message("assistant", (turn.answer,)))
            ]
            shown = {p.key: p for turn in turns for p in turn.pictures} | {p.key: p for p in pictures}
            return chat.encode([*messages, user_message(question, pictures)], shown)

        if len(prompt := without(0)) <= room:
            return prompt
        dropped = bisect.bisect_left(range(len(blind)), True, key=lambda n: len(without(n)) <= room)
        if len(prompt := without(dropped)) <= room:
            return prompt
        raise ChatError(
            f"question and pictures have {len(prompt)} tokens; {chat.name} reads {chat.window} together with its"
            f" answer, for which {chat.window - room} are kept: shorten the question, show fewer pictures or lower"
            " max_new_tokens."
        )

    def _answer_seed(self) -> int:
        return random.Random(f"{self.seed}/{len(self.history)}/{self._attempt}").getrandbits(63)


def _packed(picture: Picture) -> dict[str, str]:
    return {"name": picture.name, "data": base64.b64encode(picture.data).decode()}


def _unpacked(values: dict[str, str]) -> Picture:
    return read_picture(base64.b64decode(values["data"], validate=True), values["name"])
