"""The model of BLIP-2's first stage: a Q-Former that reads captions beside its queries, and its heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from lavis.core.registries import MODELS, TOWERS
from lavis.core.types import Batch
from lavis.data.assemble import load_tokenizer
from lavis.models.composition import Composition
from lavis.models.configs import Blip2QFormerStage1Config
from lavis.models.connectors.qformer_linear import QFormer
from lavis.weights.tensors import write_tensors


@MODELS.register("blip2_qformer")
class Blip2QFormer(Composition):
    """Vision tower, Q-Former with text branch, and heads; lavis.objectives.blip2_stage1 has the losses.

    Captions are [start] tokens [end], right-padded with `pad_token_id`; the start token serves as BERT's [CLS] and
    [DEC].
    """

    def __init__(self, config: Blip2QFormerStage1Config, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.config, self.pad_token_id = config, pad_token_id
        width = config.connector.qformer.hidden_size
        self.visual_encoder = TOWERS.get(config.tower.name).from_config(config.tower)
        self.connector = QFormer(config.connector, config.tower.width(), vocab_size)
        for part in (self.visual_encoder, self.connector):
            part.freeze()
        self.text_embeddings = Blip2TextEmbeddings(self.Qformer.config)
        nn.init.normal_(self.text_embeddings.word_embeddings.weight, std=0.02)
        nn.init.normal_(self.text_embeddings.position_embeddings.weight, std=0.02)
        self.vision_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    @classmethod
    def from_config(
        cls,
        config: Blip2QFormerStage1Config,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
    ) -> Blip2QFormer:
        """The model, with the weights its configuration names, if any."""
        tokenizer = tokenizer or load_tokenizer(config)
        model = cls(config, len(tokenizer), tokenizer.pad_token_id)
        for part in (model.visual_encoder, model.connector):
            if part.config.weights:
                part.load(part.config.weights)
            part.adapt()
        return model

    @property
    def query_tokens(self) -> nn.Parameter:
        """The queries, [1, Q, D]."""
        return self.connector.query_tokens

    @property
    def Qformer(self) -> nn.Module:
        """transformers' Q-Former."""
        return self.connector.Qformer

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return self.visual_encoder.borrowed_parameters()

    def unhooked_parameters(self) -> list[nn.Parameter]:
        parts = (self.visual_encoder, self.connector)
        return [*self.parameters(recurse=False), *(p for part in parts for p in part.unhooked_parameters())]

    def encode_images(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """The queries' vectors of each image, [N, Q, D_qformer]."""
        return self.connector.encode(self.visual_encoder.encode(pixels_NCHW))

    def image_tokens(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """What the Q-Former looks at: [N, 3, S, S] -> [N, T, D_tower] in fp32."""
        return self.connector.normed(self.visual_encoder.encode(pixels_NCHW))

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The vision tower's vectors of the batch's images [N, T, D_tower]; the Q-Former is the head."""
        assert batch.pixel_values is not None
        return self.image_tokens(batch.pixel_values)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.hidden(batch)

    def scorer(self, calls: Callable[[int], int] | None = None) -> Blip2QFormer:
        """What scores the tower's vectors: `read_along`, `similarity` and `match_logits` of this model."""
        return self

    def filler(self, batch: Batch, *, run_frozen: bool = False) -> Batch:
        """As MiniGPT4Qwen's; every part takes part in any batch."""
        return batch

    def export(self, folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
        """`stage1.safetensors`: everything, the text branch and heads included."""
        return [write_tensors(self.state_dict(), folder / "stage1.safetensors", dtype)]

    def read_along(self, ids: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query outputs [B, Q, D] and logits of each next caption token [B, T - 1, V], which see the queries.

        One pass serves both, since queries can't see the text.
        """
        n_queries, (rows, length) = self.query_tokens.shape[1], ids.shape
        total = n_queries + length
        mask = torch.zeros(total, total, dtype=torch.bool, device=tokens.device)
        mask[:, :n_queries] = True  # everyone sees the queries
        mask[n_queries:, n_queries:] = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        out = self._both(ids, tokens, mask.expand(rows, 1, total, total))
        text = out[:, n_queries:-1]
        return out[:, :n_queries], text @ self.text_embeddings.word_embeddings.weight.T

    def similarity(self, ids: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Cosine similarity over temperature, image i (its best query) against text j: [B, B]."""
        text = self.Qformer(
            query_embeds=self.text_embeddings(input_ids=ids),
            query_length=0,
            attention_mask=(ids != self.pad_token_id).long(),
        ).last_hidden_state[:, 0]
        image_feats = F.normalize(self.vision_proj(queries), dim=-1)
        text_feats = F.normalize(self.text_proj(text), dim=-1)
        return torch.einsum("iqd,jd->ijq", image_feats, text_feats).amax(-1) / self.temp

    def match_logits(self, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Whether text i belongs to image i: logits [B, 2] of no and yes, each query's averaged."""
        n_queries = self.query_tokens.shape[1]
        keep = torch.cat([ids.new_ones(len(ids), n_queries), (ids != self.pad_token_id).long()], dim=1)
        return self.itm_head(self._both(ids, tokens, keep)[:, :n_queries]).mean(1)

    def _both(self, ids: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Queries, then text through the Q-Former."""
        queries = self.query_tokens.expand(len(ids), -1, -1)
        return self.Qformer(
            query_embeds=self.text_embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=tokens,
        ).last_hidden_state
