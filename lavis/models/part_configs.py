"""Sections of the EVA tower and of the Q-Former connector. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Optional

from lavis.config.schema import opt
from lavis.models.parts import TRAIN, ConnectorConfig, TowerConfig


@dataclass
class EvaConfig(TowerConfig):
    """EVA ViT without a last norm; by default EVA-CLIP g/14 without its last block, as BLIP-2 uses it."""

    name: str = opt("eva_clip_g", "name of the tower")
    weights: Optional[str] = opt(
        None, "weight file: of the ViT alone (eva_vit_g.pth), or of a tower and a Q-Former; null starts from nothing"
    )
    patch_size: int = opt(14, "side of a patch, pixels", at_least=1)
    embed_dim: int = opt(1408, "width", at_least=1)
    depth: int = opt(39, "number of blocks", at_least=0)
    num_heads: int = opt(16, "attention heads", at_least=1)
    mlp_ratio: float = opt(6144 / 1408, "hidden width of the MLP / width")
    init_std: float = opt(
        0.02, "standard deviation of new weights; a narrow ViT trained from nothing wants more than 0.02"
    )
    pos_init_std: float = opt(0.02, "standard deviation of new position and class embeddings")
    drop_path_rate: float = opt(0.0, "stochastic depth while the ViT is trained", at_least=0)
    train_positions: bool = opt(False, "train the position embedding even if the rest is frozen")

    @property
    def trained(self) -> bool:
        return self.train != "frozen" or self.train_positions

    def changing(self, key: str) -> Iterator[str]:
        yield from super().changing(key)
        if self.train_positions:
            yield f"{key}.train_positions=true"

    def span(self) -> int:
        """Patches and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2

    def width(self) -> int:
        return self.embed_dim

    def blocks(self) -> int:
        return self.depth

    def with_depth(self, blocks: int) -> EvaConfig:
        return replace(self, depth=blocks)

    def problems(self, key: str) -> Iterator[str]:
        if self.image_size % self.patch_size:
            yield (
                f"{key}.image_size {self.image_size} is not a multiple of the patch size {self.patch_size}"
                f" ({key}.patch_size)."
            )
        if self.embed_dim % self.num_heads:
            yield (
                f"{key}: width {self.embed_dim} (embed_dim) can't be split over {self.num_heads} heads (num_heads):"
                " choose a divisor."
            )
        if self.train == "lora" and self.train_positions:
            yield f"{key}.train lora adapts a frozen tower, but {key}.train_positions is true: choose one of the two."


@dataclass
class QFormerConfig:
    """Dimensions of the Q-Former; BERT-base by default."""

    hidden_size: int = opt(768, "width", at_least=1)
    num_hidden_layers: int = opt(12, "layers", at_least=1)
    num_attention_heads: int = opt(12, "attention heads", at_least=1)
    intermediate_size: int = opt(3072, "hidden width of the MLP", at_least=1)
    cross_attention_frequency: int = opt(2, "every which layer looks at the image, from layer 0", at_least=1)
    dropout: float = opt(0.1, "dropout while the Q-Former is trained", at_least=0)
    init_std: float = opt(0.02, "standard deviation of new weights", at_least=0)
    max_position_embeddings: int = opt(512, "longest text, tokens (text branch only)", at_least=1)


@dataclass
class QFormerLinearConfig(ConnectorConfig):
    """A Q-Former, whose queries gather what an image shows, and one linear layer into the LLM's space."""

    name: str = opt("qformer_linear", "name of the connector")
    weights: Optional[str] = opt(
        None,
        "weight file of Q-Former, queries and ln_vision (BLIP-2's own, or this program's); null starts from nothing",
    )
    train: str = opt("full", "what is trained of the linear layer", choices=("frozen", "full"))
    num_query_token: int = opt(32, "vectors an image becomes", at_least=1)
    qformer: QFormerConfig = opt(QFormerConfig, "dimensions of the Q-Former")
    train_qformer: str = opt("frozen", "what is trained of the Q-Former (full: ln_vision with it)", choices=TRAIN)
    train_queries: bool = opt(False, "train the query vectors")

    @property
    def trained(self) -> bool:
        return self.train != "frozen" or any(self.changing(""))

    def changing(self, key: str) -> Iterator[str]:
        if self.train_qformer != "frozen":
            yield f"{key}.train_qformer={self.train_qformer}"
        if self.train_queries:
            yield f"{key}.train_queries=true"

    @property
    def whole(self) -> bool:
        """See ConnectorConfig: the linear layer is in no file of a Q-Former."""
        return False

    def encoded(self, tokens: int, width: int) -> tuple[int, int]:
        return self.num_query_token, self.qformer.hidden_size

    def span(self, tokens: int) -> int:
        return self.num_query_token

    def problems(self, key: str) -> Iterator[str]:
        q = self.qformer
        if q.hidden_size % q.num_attention_heads:
            yield (
                f"{key}.qformer: hidden_size {q.hidden_size} can't be split over {q.num_attention_heads} heads"
                " (num_attention_heads)."
            )
