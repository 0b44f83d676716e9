"""Answers for many at once: one thread owns the model, reads each prompt from where a stored one ends, and decodes all
answers together.

A prompt is always what the template makes of the whole conversation, and whatever part of it has been read before is
taken from
the store of keys and values. So the answer is the one that reading everything anew would give, and nobody has to keep a
state.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from transformers import Cache, LogitsProcessor, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from lavis.core.errors import BusyError, ChatError
from lavis.generation.cache import PrefixStore, cuttable, joined, layers_of, new_cache, row_of
from lavis.generation.model import ChatModel, Prompt
from lavis.generation.pictures import Picture
from lavis.generation.sampling import Chooser
from lavis.generation.settings import GenerationSettings
from lavis.models.llm import generate

if TYPE_CHECKING:
    from lavis.models.vision import Blip2Base

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
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
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

    def end(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        """Its end."""
        self.finish_reason = reason
        self.give(None)


@dataclass(eq=False)
class _Row:
    """An answer being decoded. `length`: tokens in the cache; `token`: chosen and not yet read."""

    answer: Answer
    choose: Chooser
    most: int
    length: int
    token: int = -1


class Engine:
    """Answers prompts with `chat`, at most `max_batch` at a time; the others wait, at most `max_waiting`.

    store_bytes: most memory for keys and values of conversations that may go on. Close it when it is not needed any
    more.
    """

    def __init__(
        self, chat: ChatModel, *, max_batch: int = 8, max_waiting: int = 256, store_bytes: int | None = None
    ) -> None:
        self.chat = chat
        self.cuttable = cuttable(chat.llm)
        self.max_batch = max_batch if self.cuttable else 1
        self.max_waiting = max_waiting
        self.store = PrefixStore(_store_bytes(chat.device) if store_bytes is None else store_bytes)
        self.features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._waiting: deque[Answer] = deque()
        self._rows: list[_Row] = []
        self._cache: Cache | None = None
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
            answer.fail(_told(error))

    def _admit(self, answer: Answer) -> None:
        prompt, most = answer.prompt, min(answer.settings.max_new_tokens, self.chat.window - len(answer.prompt))
        start, layers = self.store.longest(prompt.keys)
        cache = new_cache(layers)
        answer.cached_tokens = start
        embeds = self._embed(prompt, start)
        logits = self.chat.llm(
            inputs_embeds=embeds,
            position_ids=torch.arange(start, len(prompt), device=embeds.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        row = _Row(answer, Chooser(answer.settings, answer.seed, prompt.ids), most, len(prompt))
        self._take(row, row.choose(logits[0, -1].float()))
        if row.answer.finish_reason:
            self._keep(row, layers_of(cache), 0)
            return
        if self._rows:
            assert self._cache is not None
            cache = new_cache(joined([layers_of(self._cache), layers_of(cache)]))
        self._rows.append(row)
        self._cache = cache

    def _embed(self, prompt: Prompt, start: int) -> torch.Tensor:
        """Input embeddings of the prompt from token `start` on. A picture is encoded once."""
        return self.chat.embed(prompt.ids[start:], [self._features(p) for p in prompt.pictures_from(start)])

    def _features(self, picture: Picture) -> torch.Tensor:
        if picture.key not in self.features:
            tower = cast("Blip2Base", self.chat.model)
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
                if not row.answer.ended:
                    row.answer.fail(_told(error))
            self._rows, self._cache = [], None
            self.store.clear()

    def _step(self) -> None:
        """One token for each row."""
        rows, table = self._rows, cast(torch.Tensor, self.chat.llm.get_input_embeddings().weight)
        device = table.device
        longest = max(row.length for row in rows)
        mask = None
        if any(row.length < longest for row in rows):
            pads = torch.tensor([[longest - row.length] for row in rows], device=device)
            mask = (torch.arange(longest + 1, device=device)[None] >= pads).long()
        logits = (
            self.chat.llm(
                input_ids=torch.tensor([[row.token] for row in rows], device=device),
                attention_mask=mask,
                position_ids=torch.tensor([[row.length] for row in rows], device=device),
                past_key_values=self._cache,
                use_cache=True,
            )
            .logits[:, -1]
            .float()
        )
        likeliest = logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            row.length += 1
            try:
                self._take(row, likeliest[i] if row.choose.plain else row.choose(logits[i]))
            except Exception as error:  # noqa: BLE001 - such as logits that are no numbers, of this row alone
                row.answer.fail(_told(error))
        self._release()

    def _take(self, row: _Row, token: int) -> None:
        """Give the token to the reader, and end the answer where it ends."""
        answer = row.answer
        if token in self.chat.stop_token_ids:
            answer.end("stop")
            return
        row.token = token
        row.choose.ids.append(token)
        answer.give(token)
        if len(answer.ids) >= row.most:
            answer.end("length")
        elif answer.cancelled:
            answer.end("cancelled")

    def _release(self) -> None:
        """Take finished rows out of the batch and keep what they have read."""
        left = [i for i, row in enumerate(self._rows) if not row.answer.ended]
        if len(left) == len(self._rows):
            return
        assert self._cache is not None  # there are rows
        layers = layers_of(self._cache)
        for i, row in enumerate(self._rows):
            if row.answer.finish_reason:
                self._keep(row, layers, i)
        rows = [self._rows[i] for i in left]
        self._cache = new_cache(joined([row_of(layers, i, self._rows[i].length) for i in left])) if rows else None
        self._rows = rows

    def _keep(self, row: _Row, layers: list, index: int) -> None:
        read = row.answer.ids[: row.length - len(row.answer.prompt)]
        self.store.put((*row.answer.prompt.keys, *read), row_of(layers, index, row.length))

    def _answer_whole(self, answer: Answer) -> None:
        """Let transformers generate: for beams, and for LLMs whose memory can't be cut."""
        s, prompt, chat = answer.settings, answer.prompt, self.chat
        cancelled = lambda: answer.cancelled or self._closed  # noqa: E731
        drawn = (
            {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
            if s.do_sample
            else {"temperature": None, "top_p": None, "top_k": None}
        )
        devices = [chat.device] if chat.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(answer.seed)
            (ids,) = generate(
                chat.llm,
                self._embed(prompt, 0),
                [len(prompt)],
                sorted(chat.stop_token_ids),
                chat.template.pad_token_id,
                max_new_tokens=s.max_new_tokens,
                do_sample=s.do_sample,
                num_beams=s.num_beams,
                repetition_penalty=1.0,
                logits_processor=[_Penalty(s.repetition_penalty, prompt.ids)] if s.repetition_penalty != 1 else [],
                stopping_criteria=[_When(cancelled)],
                **drawn,
            )
        for token in ids:
            answer.give(token)
        full = len(ids) >= min(s.max_new_tokens, chat.window - len(prompt))
        answer.end("cancelled" if cancelled() else "length" if full else "stop")


class _Penalty(LogitsProcessor):
    """A repetition penalty that counts the prompt's tokens too, which generate does not know when it is given
    embeddings.
    """

    def __init__(self, penalty: float, prompt: tuple[int, ...]) -> None:
        self.penalise, self.prompt = RepetitionPenaltyLogitsProcessor(penalty), torch.tensor([prompt])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prompt = self.prompt.to(input_ids.device).expand(len(input_ids), -1)
        return self.penalise(torch.cat([prompt, input_ids], 1), scores)


class _When(StoppingCriteria):
    """Ends generation when `condition` holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.condition(), device=input_ids.device)


def _told(error: Exception) -> ChatError:
    """What the reader is told; the log has the rest."""
    if isinstance(error, ChatError):
        return error
    log.error("an answer failed", exc_info=error)
    return ChatError(f"the model failed ({type(error).__name__}).")


def _store_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return STORE_BYTES
    return int(min(STORE_BYTES, STORE_SHARE * torch.cuda.get_device_properties(device).total_memory))
