"""The decoding loop: rows of a batch, each continued token by token until it ends. Evaluation, sample prompts and chat
share it; how a model that lies on one device or on many is asked for logits is its `Decoder`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from transformers import Cache, PreTrainedModel

from lavis.core.errors import DataError
from lavis.core.types import Batch
from lavis.generation.cache import Layers, joined, layers_of, left_padded, new_cache
from lavis.generation.sampling import Chooser
from lavis.generation.settings import GenerationSettings
from lavis.generation.whole import generate_whole
from lavis.models.attention import attends_only
from lavis.models.llm import context_length

FinishReason = Literal["stop", "length", "cancelled"]


class Decoder(ABC):
    """Rows that are read and continued together. Where several ranks hold parts of one model, all call it together."""

    @property
    @abstractmethod
    def window(self) -> int:
        """Tokens that a prompt and its answer have together at most."""

    @property
    @abstractmethod
    def repetition_penalty(self) -> float:
        """The one that the makers of the LLM recommend, 1 for none."""

    @abstractmethod
    def read(self, batch: Batch) -> torch.Tensor | None:
        """Add the right-padded prompts of `batch` as rows: logits [n, V], fp32, of what comes next.

        None on a rank that does not make them.
        """

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Read one more token of each row: logits [B, V] as from `read`."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""

    def agreed(self, tokens: list[int] | None, rows: int) -> list[int]:
        """What every rank that has these rows takes for each, given what was chosen where there are logits."""
        return tokens or []

    def goes_on(self, unfinished: bool) -> bool:
        """Whether there is another step: also for a rank without rows, where others need it at their side."""
        return unfinished

    def generate(
        self, batch: Batch, stop_token_ids: Collection[int], pad_token_id: int, settings: GenerationSettings
    ) -> list[list[int]]:
        """The ids that continue each prompt of `batch`, without the one that ended it. For an empty decoder.

        Raises DataError for a prompt that fills the window.
        """
        longest = max(batch.lengths)
        if longest >= self.window:
            raise DataError(
                f"a prompt of {longest} tokens leaves no room for an answer: the LLM reads {self.window}. Shorten the"
                " conversation."
            )
        rows = [
            Row(Chooser(settings, i, ()), min(settings.max_new_tokens, self.window - length), stop_token_ids)
            for i, length in enumerate(batch.lengths)
        ]
        with torch.inference_mode():
            decoding = Decoding[Decoder, Row](self)
            decoding.begin(rows, self.read(batch))
            decoding.release()
            while self.goes_on(bool(decoding.rows)):
                decoding.step()
                decoding.release()
        return [row.ids for row in rows]


class Row:
    """An answer being made. most: tokens it may have."""

    def __init__(self, choose: Chooser, most: int, stop_token_ids: Collection[int]) -> None:
        self.choose, self.most, self.stop_token_ids = choose, most, frozenset(stop_token_ids)
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def ended(self) -> bool:
        """Whether no token will come any more."""
        return self.finish_reason is not None

    def take(self, token: int) -> None:
        """Go on by `token`, or end with it."""
        if self.ended:
            return
        if token in self.stop_token_ids:
            self.end("stop")
            return
        self.choose.ids.append(token)
        self.give(token)
        if len(self.ids) >= self.most:
            self.end("length")

    def give(self, token: int) -> None:
        self.ids.append(token)

    def end(self, reason: FinishReason) -> None:
        """No token will come any more."""
        self.finish_reason = reason

    def fail(self, error: Exception) -> None:
        """No token could be chosen. Raised here; where rows are of several readers, the others go on."""
        raise error


D = TypeVar("D", bound=Decoder)
R = TypeVar("R", bound=Row)


class Decoding(Generic[D, R]):
    """Rows in the order in which `decoder` holds them."""

    def __init__(self, decoder: D) -> None:
        self.decoder = decoder
        self.rows: list[R] = []

    def begin(self, rows: Sequence[R], logits: torch.Tensor | None) -> None:
        """Choose the first tokens of rows that the decoder has read."""
        self.rows += rows
        self._take(rows, logits)

    def step(self) -> None:
        """One token for each row."""
        self._take(self.rows, self.decoder.step([row.ids[-1] for row in self.rows]))

    def release(self) -> None:
        """Take ended rows out."""
        left = [i for i, row in enumerate(self.rows) if not row.ended]
        if len(left) < len(self.rows):
            self.decoder.keep(left)
            self.rows = [self.rows[i] for i in left]

    def _take(self, rows: Sequence[Row], logits: torch.Tensor | None) -> None:
        chosen = None if logits is None else list(_chosen(rows, logits))
        tokens = self.decoder.agreed(chosen, len(rows))
        for row, token in zip(rows, tokens, strict=True):
            row.take(token)


def _chosen(rows: Sequence[Row], logits: torch.Tensor) -> Iterator[int]:
    likeliest = logits.argmax(-1).tolist()
    for i, row in enumerate(rows):
        try:
            yield likeliest[i] if row.choose.plain else row.choose(logits[i])
        except Exception as error:  # noqa: BLE001 - such as logits that are no numbers, of this row alone
            row.fail(error)
            yield likeliest[i]


class KeyValueDecoder(Decoder):
    """A decoder whose rows lie in one cache of keys and values, the shorter ones padded on the left."""

    def __init__(self, llm: PreTrainedModel) -> None:
        self.llm = llm
        self.lengths: list[int] = []
        self._cache: Cache | None = None

    @property
    def window(self) -> int:
        return context_length(self.llm)

    @property
    def repetition_penalty(self) -> float:
        return getattr(self.llm.generation_config, "repetition_penalty", None) or 1.0

    @property
    def layers(self) -> Layers:
        """Views of what is held of the rows."""
        return layers_of(self._cache) if self._cache else []

    @abstractmethod
    def _forward(self, inputs: torch.Tensor | None, **settings: Any) -> torch.Tensor | None:
        """Logits behind the last of `inputs`: embeddings [B, L, D] of prompts (None on a rank that does not make
        them), or ids [B, 1].
        """

    @property
    @abstractmethod
    def _device(self) -> torch.device:
        """Where ids, masks and positions go."""

    def add(
        self, embeds: torch.Tensor | None, width: int, lengths: Sequence[int], layers: Layers | None = None
    ) -> torch.Tensor | None:
        """Add rows of `lengths` tokens whose last `width` are read here, left-padded, and those before are `layers`."""
        total = width + (layers[0][0].shape[-2] if layers else 0)
        cache = new_cache(layers)
        logits = self._forward(embeds, past_key_values=cache, **self._places(lengths, total - width, total))
        if self.lengths:
            cache = new_cache(joined([self.layers, layers_of(cache)]))
        self._cache, self.lengths = cache, [*self.lengths, *lengths]  # at the end, as reading may fail
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor | None:
        longest = max(self.lengths)
        ids = torch.tensor(tokens, device=self._device)[:, None]
        lengths = [n + 1 for n in self.lengths]
        logits = self._forward(ids, past_key_values=self._cache, **self._places(lengths, longest, longest + 1))
        self.lengths = lengths
        return logits

    def _places(self, lengths: Sequence[int], start: int, total: int) -> dict[str, torch.Tensor | None]:
        """Attention mask and positions of columns `start` to `total` of left-padded rows."""
        pads = torch.tensor([[total - n] for n in lengths], device=self._device)
        columns = torch.arange(total, device=self._device)[None]
        mask = (columns >= pads).long() if any(n < total for n in lengths) else None
        return {"attention_mask": mask, "position_ids": (columns[:, start:] - pads).clamp(min=0)}

    def keep(self, rows: Sequence[int]) -> None:
        layers, self.lengths = self.layers, [self.lengths[i] for i in rows]
        if not rows:
            self._cache = None
            return
        index, longest = torch.tensor(rows, device=layers[0][0].device), max(self.lengths)

        def cut(t: torch.Tensor) -> torch.Tensor:  # columns that were padding in all rows that are left go too
            return t[:, :, t.shape[-2] - longest :].index_select(0, index.to(t.device))

        self._cache = new_cache([(cut(keys), cut(values)) for keys, values in layers])


class LocalDecoder(KeyValueDecoder):
    """Decodes with `model` (an `embed` and an `llm_model`) as it is in this process."""

    synced = False
    """Whether transformers' generate is to go on as long as any rank does."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.llm_model)
        self.model = model

    @property
    def _device(self) -> torch.device:
        return cast(torch.Tensor, self.llm.get_input_embeddings().weight).device

    def _forward(self, inputs: torch.Tensor | None, **settings: Any) -> torch.Tensor | None:
        assert inputs is not None
        key = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        # logits of a prompt's other positions would be [L, vocabulary], and nobody reads them
        out = self.llm(**{key: inputs}, use_cache=True, logits_to_keep=1, **settings)
        return out.logits[:, -1].float()

    def read(self, batch: Batch) -> torch.Tensor | None:
        embeds = left_padded(self.model.embed(batch), batch.lengths)
        return self.add(embeds, embeds.shape[1], batch.lengths)

    def generate(
        self, batch: Batch, stop_token_ids: Collection[int], pad_token_id: int, settings: GenerationSettings
    ) -> list[list[int]]:
        """See Decoder. Beams, and LLMs that remember more than keys and values, are left to transformers."""
        if settings.num_beams == 1 and attends_only(self.llm):
            return super().generate(batch, stop_token_ids, pad_token_id, settings)
        with torch.inference_mode():
            embeds = self.model.embed(batch)
        more: dict[str, Any] = {"synced_gpus": True} if self.synced else {}
        return generate_whole(self.llm, embeds, batch.lengths, stop_token_ids, pad_token_id, settings, **more)
