"""BLIP-2's Q-Former (transformers) with ln_vision and learned queries, and one linear layer into the LLM's space."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from lavis.core.registries import CONNECTORS
from lavis.models.adapters import add_lora
from lavis.models.connectors.base import Connector
from lavis.models.part import Part
from lavis.models.part_configs import QFormerLinearConfig
from lavis.weights.lavis_names import is_elsewhere, is_text_branch, own_names
from lavis.weights.tensors import LoadReport, load_tensors, read_tensors

ENCODER = ("ln_vision.", "query_tokens", "Qformer.")
"""Names of what a weight file of a Q-Former holds."""


class QFormer(Part):
    """[N, T, D_tower] -> [N, num_query_token, D_qformer]; with its text branch if a vocabulary size is given."""

    config: QFormerLinearConfig

    def __init__(self, config: QFormerLinearConfig, tower_width: int, text_vocab_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.ln_vision = nn.LayerNorm(tower_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_token, config.qformer.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.Qformer = _build(config, tower_width, text_vocab_size)

    def freeze(self) -> None:
        self.ln_vision.requires_grad_(self.config.train_qformer == "full")
        self.Qformer.requires_grad_(self.config.train_qformer == "full")
        self.query_tokens.requires_grad_(self.config.train_queries)

    def adapt(self) -> None:
        if self.config.train_qformer == "lora":
            add_lora(self.Qformer, self.config.lora, "Qformer.{}".format)

    def train(self, mode: bool = True) -> QFormer:
        """See Part; without dropout where the queries alone are trained."""
        nn.Module.train(self, mode)
        self.Qformer.train(mode and any(p.requires_grad for p in self.Qformer.parameters()))
        return self

    def normed(self, vectors_NTD: torch.Tensor) -> torch.Tensor:
        """The tower's vectors as the Q-Former looks at them, in fp32."""
        with torch.autocast(vectors_NTD.device.type, enabled=False):
            return self.ln_vision(vectors_NTD.float())

    def encode(self, vectors_NTD: torch.Tensor) -> torch.Tensor:
        """See the class."""
        tokens = self.normed(vectors_NTD)
        queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
        return self.Qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state

    @property
    def encoder_frozen(self) -> bool:
        """Whether `encode` can never change."""
        parts = (*self.Qformer.parameters(), *self.ln_vision.parameters(), self.query_tokens)
        return not any(p.requires_grad for p in parts)

    def load(self, source: str) -> LoadReport:
        """From this program's names, or the original BLIP-2 file's.

        The tower, the text branch and other models' heads are ignored by name, unless the model has them.
        """
        tensors = own_names(read_tensors(source))
        own = self.state_dict().keys()

        def ignored(name: str) -> bool:
            return (
                is_elsewhere(name) or name.startswith("visual_encoder.") or (name not in own and is_text_branch(name))
            )

        wanted = lambda name: name.startswith(ENCODER)  # noqa: E731
        return load_tensors(self, tensors, file=source, wanted=wanted, ignored=ignored)


@CONNECTORS.register("qformer_linear")
class QFormerLinear(QFormer, Connector):
    """The queries' outputs through one linear layer."""

    config: QFormerLinearConfig
    encoder_prefixes = ENCODER

    def __init__(self, config: QFormerLinearConfig, tower_width: int, llm_width: int) -> None:
        super().__init__(config, tower_width)
        self.llm_proj = nn.Linear(config.qformer.hidden_size, llm_width)

    def freeze(self) -> None:
        super().freeze()
        self.llm_proj.requires_grad_(self.config.train == "full")

    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        return self.llm_proj(encoded_NTD)


def _build(config: QFormerLinearConfig, tower_width: int, text_vocab_size: int | None) -> Blip2QFormerModel:
    c = config.qformer
    return Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            intermediate_size=c.intermediate_size,
            cross_attention_frequency=c.cross_attention_frequency,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
            encoder_hidden_size=tower_width,
            initializer_range=c.init_std,
            max_position_embeddings=c.max_position_embeddings,
            use_qformer_text_input=text_vocab_size is not None,
            vocab_size=text_vocab_size or 30522,
        )
    )
