"""The nouns of the data path: Conversation, Pair or Document -> Sample -> Batch. One frozen dataclass each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lavis.core.errors import DataError

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""
IMAGE_TAG = "<ImageHere>"
"""What stands for an image in the text of a user turn in annotation files."""

Role = Literal["system", "user", "assistant"]


class RowError(DataError):
    """A row that cannot be used.

    `reason` is the kind of problem, under which reports count it; `fix` says what to do.
    """

    def __init__(self, reason: str, where: str, fix: str, detail: str = "") -> None:
        self.reason, self.where, self.fix = reason, where, fix
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}. {fix}")


@dataclass(frozen=True)
class MediaRef:
    """A picture inside a message: a path (relative ones are under the data's image folder).

    size: (width, height) of the upright picture in pixels; known only where the number of its tiles depends on it.
    """

    path: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Message:
    """One turn. `parts` are texts and pictures in reading order; only user turns hold pictures.

    Nothing that a model wants around a picture stands in the texts: its media format adds that. What separates a
    picture from the text behind it is one leading space of that text.
    """

    role: Role
    parts: tuple[str | MediaRef, ...]

    @property
    def text(self) -> str:
        """The turn as text, with IMAGE_TAG for each picture."""
        return "".join(p if isinstance(p, str) else IMAGE_TAG for p in self.parts)

    @property
    def words(self) -> str:
        """The turn as text without its pictures."""
        return "".join(p for p in self.parts if isinstance(p, str))


@dataclass(frozen=True)
class Conversation:
    """A dialogue in the one form that all annotation dialects are read into.

    `id` names the row in messages; `kind` and `lang` are free labels by which evaluation groups its scores.
    """

    messages: tuple[Message, ...]
    id: str = ""
    kind: str = ""
    lang: str = ""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """All pictures in reading order."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, MediaRef))

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of all pictures in reading order."""
        return tuple(ref.path for ref in self.media)


@dataclass(frozen=True)
class Document:
    """Running text, learned as a whole. `id` names the row in messages."""

    text: str
    id: str = ""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in the last answer alone, of which the first was preferred."""

    chosen: Conversation
    rejected: Conversation

    @property
    def id(self) -> str:
        """Names the row in messages."""
        return self.chosen.id

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """Pictures of the prompt, which both have."""
        return self.chosen.media

    def map(self, change: Callable[[Conversation], Conversation]) -> Pair:
        """The pair with `change` made to both conversations."""
        return Pair(change(self.chosen), change(self.rejected))


Example = Conversation | Document | Pair
"""What a dialect makes of a row of a file. A prompt without an answer is a Conversation that ends with the user."""


@dataclass(frozen=True)
class MediaSpan:
    """Where a picture's vectors go: `length` positions of a sample from `start` on; none where it stands beside it.

    tiles: pieces the picture is cut into, each of which gives an equal share of the vectors.
    """

    ref: MediaRef
    start: int
    length: int
    tiles: int = 1


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation, or a block of documents.

    input_ids: [L] token ids; each picture is a run of placeholder ids.
    labels: [L] the token id where it is supervised, IGNORE_INDEX elsewhere; not shifted; labels[0] is IGNORE_INDEX.
    media: the pictures with their runs, in reading order (paths absolute, or relative to the data's image folder).
    parts: lengths of the pieces that do not see each other, documents of a block; empty: one piece.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    media: tuple[MediaSpan, ...] = ()
    parts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of the pictures in reading order."""
        return tuple(span.ref.path for span in self.media)

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the pieces that do not see each other, together the length of the sample."""
        return self.parts or (len(self),)

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, B rows of L positions.

    input_ids: int64 [B, L]; padding is the pad id.
    labels: int64 [B, L], IGNORE_INDEX where not supervised; not shifted.
    position_ids: int64 [B, L]. They restart at 0 with each packed sample, which is what makes attention block-diagonal;
        right padding after a single sample goes on counting (a causal model never looks at it).
    pixel_values: float32 [T, 3, S, S], the tiles of all pictures of all rows in reading order; None without a picture.
    features: float32 [T, Q, D], cached outputs of the image encoder in place of pixel_values.
    tiles: for each picture, how many of the T tiles are its own.
    lengths: for each row, how many of its positions are not padding.
    num_samples: conversations or blocks (packed ones each count).
    bad_images: how many pictures were replaced because they could not be read.
    runs: for each row, lengths of the pieces that do not see each other, without padding; empty: as positions say.
    beginning: token ids that every piece begins with, before any picture; empty: none that are known.
    predicting: int64 [supervised_tokens], the positions whose next token is supervised; placeholders: int64 [n], those
        that pictures fill. Both count through [B * L], and are known here so that no one has to look for them in what
        lies on a GPU, which would wait for all that it has still to do. None: not told.
    about: the input_ids, labels and position_ids that these four are about. They are taken for nothing in a batch that
        has others, as one that `replace` made; see `known`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None
    tiles: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    supervised_tokens: int = 0
    num_samples: int = 0
    bad_images: int = 0
    runs: tuple[tuple[int, ...], ...] = ()
    beginning: tuple[int, ...] = ()
    predicting: torch.Tensor | None = None
    placeholders: torch.Tensor | None = None
    about: tuple[torch.Tensor, ...] = ()

    @property
    def known(self) -> Batch:
        """This batch, without what is told of its positions if that was about other ones."""
        own = (self.input_ids, self.labels, self.position_ids)
        if len(self.about) == len(own) and all(a is b for a, b in zip(self.about, own, strict=True)):
            return self
        return replace(self, runs=(), beginning=(), predicting=None, placeholders=None, about=())

    def told(self, **facts: Any) -> Batch:
        """The batch with `facts` (runs, beginning, predicting, placeholders) that are about its positions."""
        return replace(self, **facts, about=(self.input_ids, self.labels, self.position_ids))

    @property
    def num_pad(self) -> int:
        """Positions that are padding."""
        return self.input_ids.numel() - sum(self.lengths)

    def supervised(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(vectors, token ids) of the positions that are learned: what `hidden` [B, L, D] says of the next token, and
        which that is.
        """
        told = self.known.predicting
        at = predicting(self.labels) if told is None else told
        return hidden.flatten(0, 1).index_select(0, at), self.labels.flatten().index_select(0, at + 1)

    def to(self, device: Any) -> Batch:
        """The same batch on `device`."""
        return self._changed(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU copies from by itself; torch's loaders call this."""
        return self._changed(lambda t: t.pin_memory())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by field."""
        import torch

        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        known = self.known
        tensors: dict[str, Any] = {name: change(tensor) for name, tensor in known.tensors().items()}
        changed = replace(known, **tensors)
        return changed.told() if known.about else changed


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """See Batch; labels: int64 [B, L]."""
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False  # nothing before it says what it is
    return supervised.flatten().nonzero().squeeze(1) - 1
