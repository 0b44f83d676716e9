"""Answers for many at once: one thread owns the model, reads each prompt from where a stored one ends, and decodes all
answers together.

A prompt is always what the template makes of the whole conversation, and whatever part of it has been read before is
taken from the store of keys and values. So the answer is the one that reading everything again would give, and nobody
has to keep a state.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from lavis.core.errors import BusyError, ChatError
from lavis.generation.cache import PrefixStore, row_of
from lavis.generation.decoding import Decoding, FinishReason, LocalDecoder, Row
from lavis.generation.model import ChatModel, Prompt
from lavis.generation.pictures import Picture
from lavis.generation.sampling import Chooser
from lavis.generation.settings import GenerationSettings
from lavis.generation.whole import generate_whole
from lavis.models.attention import attends_only

if TYPE_CHECKING:
    from lavis.models.vlm import Vlm

log = logging.getLogger(__name__)

STORE_SHARE = 0.1
"""Share of the device's memory that keys and values of conversations may take between questions, at most."""
STORE_BYTES = 2 << 30
FEATURE_ROWS = 512
"""Pictures whose features are kept."""

Sink = Callable[["int | None"], object]


@dataclass(eq=False)
class Answer:
    """An answer on its way: iterate to get its token ids as they come. `cancel` ends it early.

    finish_reason: stop (the model ended it), length, or cancelled; None while it is not at its end. cached_tokens: of
    the prompt, those not read again.
    """

    prompt: Prompt
    settings: GenerationSettings
    seed: int
    sink: Sink | None = None
    ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _queue: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[int]:
        while (token := self._queue.get()) is not None:
            yield token
        self._queue.put(None)  # for whoever asks again
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End it after the token being made; what has come stays."""
        self._cancelled.set()

    def leave(self) -> None:
        """As `cancel`, and let the reader go at once, whatever the engine is at. For a signal's handler too."""
        self._cancelled.set()
        self._queue.put(None)

    @property
    def ended(self) -> bool:
        """Whether no token will come any more."""
        return self.finish_reason is not None or self.error is not None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def give(self, token: int | None) -> None:
        """Hand a token to the reader; None is the end."""
        if token is not None:
            self.ids.append(token)
        try:
            (self.sink or self._queue.put)(token)
        except Exception:
            log.warning("the reader of an answer failed", exc_info=True)
            self.cancel()

    def fail(self, error: Exception) -> None:
        """End it with an error that the reader gets."""
        self.error = error
        self.give(None)

    def end(self, reason: FinishReason) -> None:
        """Its end."""
        self.finish_reason = reason
        self.give(None)


class _AnswerRow(Row):
    """An answer being decoded. What fails it, or who leaves it, is that answer's alone."""

    def __init__(self, answer: Answer, most: int, stop_token_ids: Collection[int]) -> None:
        super().__init__(Chooser(answer.settings, answer.seed, answer.prompt.ids), most, stop_token_ids)
        self.answer, self.ids = answer, answer.ids

    @property
    def ended(self) -> bool:
        return self.answer.ended

    def take(self, token: int) -> None:
        super().take(token)
        if not self.ended and self.answer.cancelled:
            self.end("cancelled")

    def give(self, token: int) -> None:
        self.answer.give(token)

    def end(self, reason: FinishReason) -> None:
        self.answer.end(reason)

    def fail(self, error: Exception) -> None:
        self.answer.fail(_for_reader(error))


class Engine:
    """Answers prompts with `chat`, at most `max_batch` at a time; the others wait, at most `max_waiting`.

    store_bytes: most memory for keys and values of conversations that may go on. Close it when it is not needed any
    more.
    """

    def __init__(
        self, chat: ChatModel, *, max_batch: int = 8, max_waiting: int = 256, store_bytes: int | None = None
    ) -> None:
        self.chat = chat
        self.cuttable = attends_only(chat.llm)
        self.max_batch = max_batch if self.cuttable else 1
        self.max_waiting = max_waiting
        self.store = PrefixStore(_store_bytes(chat.device) if store_bytes is None else store_bytes)
        self.features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._waiting: deque[Answer] = deque()
        self._decoding = self._new_decoding()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="lavis-engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Prompt, settings: GenerationSettings | None = None, *, seed: int = 42, sink: Sink | None = None
    ) -> Answer:
        """Ask for an answer. `sink` gets its tokens in place of the iterator, called from the engine's thread.

        Raises ChatError if the prompt leaves no room for an answer, BusyError if too many wait.
        """
        if len(prompt) >= self.chat.window:
            raise ChatError(
                f"the conversation has {len(prompt)} tokens, but {self.chat.name} reads at most {self.chat.window} with"
                " its answer: shorten or clear it."
            )
        answer = Answer(prompt, settings or self.chat.defaults, seed, sink)
        with self._wake:
            if self._closed:
                raise ChatError("the engine is closed.")
            self._drop_cancelled()
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{len(self._waiting)} questions wait already: try again later.")
            self._waiting.append(answer)
            self._wake.notify()
        return answer

    def _drop_cancelled(self) -> None:
        """Free the places of questions that nobody waits for any more."""
        for answer in [a for a in self._waiting if a.cancelled]:
            self._waiting.remove(answer)
            answer.end("cancelled")

    @property
    def load(self) -> tuple[int, int]:
        """(answers being decoded, questions that wait)."""
        return len(self._rows), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End all answers and free the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @property
    def _rows(self) -> list[_AnswerRow]:
        return self._decoding.rows

    def _new_decoding(self) -> Decoding[LocalDecoder, _AnswerRow]:
        return Decoding(LocalDecoder(self.chat.model))

    # ---- the thread

    def _work(self) -> None:
        with torch.inference_mode():
            while self._next():
                if self._rows:
                    self._guarded_step()

    def _next(self) -> bool:
        """Wait for something to do, and begin what there is room for. False when the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._rows)
            self._drop_cancelled()
            room = len(self._waiting) if self._closed else self.max_batch - len(self._rows)
            new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if self._closed:
            for answer in [*new, *(row.answer for row in self._rows)]:
                answer.end("cancelled")
            return False
        for answer in new:
            self._begin(answer)
        return True

    def _begin(self, answer: Answer) -> None:
        """Read a prompt and choose the first token of its answer. A failure is that answer's alone."""
        try:
            if answer.cancelled:
                answer.end("cancelled")
            elif answer.settings.num_beams > 1 or not self.cuttable:
                self._answer_whole(answer)
            else:
                self._admit(answer)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            if not answer.ended:
                answer.fail(_for_reader(error))

    def _admit(self, answer: Answer) -> None:
        prompt, most = answer.prompt, min(answer.settings.max_new_tokens, self.chat.window - len(answer.prompt))
        start, layers = self.store.longest(prompt.keys)
        answer.cached_tokens = start
        logits = self._decoding.decoder.add(self._embed(prompt, start), len(prompt) - start, [len(prompt)], layers)
        self._decoding.begin([_AnswerRow(answer, most, self.chat.stop_token_ids)], logits)
        self._release()

    def _embed(self, prompt: Prompt, start: int) -> torch.Tensor:
        """Input embeddings of the prompt from token `start` on. A picture is encoded once."""
        return self.chat.embed(prompt.ids[start:], [self._features(p) for p in prompt.pictures_from(start)])

    def _features(self, picture: Picture) -> torch.Tensor:
        if picture.key not in self.features:
            tower = cast("Vlm", self.chat.model)
            self.features[picture.key] = tower.encode_images(self.chat.pixels(picture))
            if len(self.features) > FEATURE_ROWS:
                self.features.popitem(last=False)
        self.features.move_to_end(picture.key)
        return self.features[picture.key]

    def _guarded_step(self) -> None:
        try:
            self._step()
        except Exception as error:  # noqa: BLE001 - out of memory, say: the engine goes on without them
            for row in self._rows:
                if not row.ended:
                    row.fail(error)
            self._decoding = self._new_decoding()
            self.store.clear()

    def _step(self) -> None:
        """One token for each row."""
        self._decoding.step()
        self._release()

    def _release(self) -> None:
        """Take finished rows out of the batch and keep what they have read."""
        decoder = self._decoding.decoder
        layers = decoder.layers if any(row.ended for row in self._rows) else []
        for i, row in enumerate(self._rows):
            answer, length = row.answer, decoder.lengths[i]
            if answer.finish_reason:
                read = answer.ids[: length - len(answer.prompt)]
                self.store.put((*answer.prompt.keys, *read), row_of(layers, i, length))
        self._decoding.release()

    def _answer_whole(self, answer: Answer) -> None:
        """Let transformers generate: for beams, and for LLMs whose memory can't be cut."""
        s, prompt, chat = answer.settings, answer.prompt, self.chat
        cancelled = lambda: answer.cancelled or self._closed  # noqa: E731
        devices = [chat.device] if chat.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(answer.seed)
            (ids,) = generate_whole(
                chat.llm,
                self._embed(prompt, 0),
                [len(prompt)],
                chat.stop_token_ids,
                chat.template.pad_token_id,
                s,
                prompt_ids=prompt.ids,
                until=cancelled,
            )
        for token in ids:
            answer.give(token)
        full = len(ids) >= min(s.max_new_tokens, chat.window - len(prompt))
        answer.end("cancelled" if cancelled() else "length" if full else "stop")


def _for_reader(error: Exception) -> ChatError:
    """What the reader gets of an error; the log has the rest."""
    if isinstance(error, ChatError):
        return error
    log.error("an answer failed", exc_info=error)
    return ChatError(f"the model failed ({type(error).__name__}).")


def _store_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return STORE_BYTES
    return int(min(STORE_BYTES, STORE_SHARE * torch.cuda.get_device_properties(device).total_memory))
