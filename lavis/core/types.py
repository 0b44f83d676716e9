"""The nouns of the data path: Conversation -> Sample -> Batch. One frozen dataclass each."""

from __future__ import annotations

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
    """A row that can't be used.

    `reason` is the kind of problem, under which reports count it; `mend` says what to do.
    """

    def __init__(self, reason: str, where: str, mend: str, detail: str = "") -> None:
        self.reason, self.where, self.mend = reason, where, mend
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}. {mend}")


@dataclass(frozen=True)
class ImageRef:
    """An image inside a message: a path (relative ones are under the dataset's image folder)."""

    path: str


@dataclass(frozen=True)
class Message:
    """One turn. `parts` are texts and images in reading order; only user turns hold images."""

    role: Role
    parts: tuple[str | ImageRef, ...]

    @property
    def text(self) -> str:
        """The turn as text, with IMAGE_TAG for each image."""
        return "".join(p if isinstance(p, str) else IMAGE_TAG for p in self.parts)


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
    def images(self) -> tuple[str, ...]:
        """Paths of all images in reading order."""
        return tuple(p.path for m in self.messages for p in m.parts if isinstance(p, ImageRef))


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation.

    input_ids: [L] token ids; each image is a run of `num_query_token` placeholder ids.
    labels: [L] the token id where it is supervised, IGNORE_INDEX elsewhere; not shifted; labels[0] is IGNORE_INDEX.
    images: paths in the order of their placeholder runs (absolute, or relative to the dataset's image folder).
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """Number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, B rows of L positions.

    input_ids: int64 [B, L]; padding is the pad id.
    labels: int64 [B, L], IGNORE_INDEX where not supervised; not shifted.
    position_ids: int64 [B, L]. They restart at 0 with each packed sample, which is what makes attention block-diagonal;
        right padding after a single sample goes on counting (a causal model never looks at it).
    pixel_values: float32 [N, 3, H, W], the images of all rows in reading order; None when there is no image.
    features: float32 [N, Q, D], cached Q-Former outputs in place of pixel_values.
    lengths: for each row, how many of its positions are not padding.
    num_tokens: supervised tokens; num_samples: conversations (packed ones each count);
    bad_images: how many images were replaced because they could not be read.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None
    lengths: tuple[int, ...] = ()
    num_tokens: int = 0
    num_samples: int = 0
    bad_images: int = 0

    @property
    def num_pad(self) -> int:
        """Positions that are padding."""
        return self.input_ids.numel() - sum(self.lengths)

    def to(self, device: Any) -> Batch:
        """The same batch on `device`."""

        def move(t: torch.Tensor) -> torch.Tensor:
            return t.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            pixel_values=None if self.pixel_values is None else move(self.pixel_values),
            features=None if self.features is None else move(self.features),
        )
