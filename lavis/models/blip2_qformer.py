"""BLIP-2's first stage: the Q-Former learns which image tokens matter by three losses against captions.

Contrastive (ITC), matching with hard negatives (ITM) and image-grounded generation (ITG), after Li et al. 2023, section
3.
Negatives come from the micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from lavis.core.output import LossOutput
from lavis.core.registries import MODELS, TOWERS
from lavis.core.types import IGNORE_INDEX, Batch
from lavis.data.assemble import load_tokenizer
from lavis.models.composition import Composition
from lavis.models.configs import Blip2QFormerStage1Config
from lavis.models.connectors.qformer_linear import QFormer


@MODELS.register("blip2_qformer")
class Blip2QFormer(Composition):
    """Vision tower, Q-Former with text branch, and the heads of the three losses.

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
        """As Vlm's."""
        return self.visual_encoder.borrowed_parameters()

    def unhooked_parameters(self) -> list[nn.Parameter]:
        """As Vlm's."""
        parts = (self.visual_encoder, self.connector)
        return [*self.parameters(recurse=False), *(p for part in parts for p in part.unhooked_parameters())]

    def encode_images(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """The queries' vectors of each image, [N, Q, D_qformer]."""
        return self.connector.encode(self.visual_encoder.encode(pixels_NCHW))

    def image_tokens(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """What the Q-Former looks at: [N, 3, S, S] -> [N, T, D_tower] in fp32."""
        return self.connector.normed(self.visual_encoder.encode(pixels_NCHW))

    def forward(self, batch: Batch) -> LossOutput:
        """The three losses over the batch's images (one caption each); sums over images."""
        assert batch.pixel_values is not None and len(batch.pixel_values) == len(batch.input_ids)
        tokens = self.image_tokens(batch.pixel_values)
        queries, itg = self._queries_and_generation(batch, tokens)
        image_text = self._similarity(batch, queries)
        itc = self._contrastive(image_text)
        itm = self._matching(batch, tokens, image_text)
        c, n = self.config, len(tokens)
        loss = c.itc_weight * itc + c.itm_weight * itm + c.itg_weight * itg
        parts = {"itc": itc, "itm": itm, "itg": itg}
        return LossOutput(loss * n, n, {k: v.detach() * n for k, v in parts.items()})

    def _queries_and_generation(self, batch: Batch, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query outputs [B, Q, D], and the mean generation loss per token; one pass serves both, since queries can't
        see the text.
        """
        n_queries, (rows, length) = self.query_tokens.shape[1], batch.input_ids.shape
        total = n_queries + length
        mask = torch.zeros(total, total, dtype=torch.bool, device=tokens.device)
        mask[:, :n_queries] = True  # everyone sees the queries
        mask[n_queries:, n_queries:] = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        out = self._qformer(batch, tokens, mask.expand(rows, 1, total, total))
        text = out[:, n_queries:-1]
        logits = text @ self.text_embeddings.word_embeddings.weight.T
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
        return out[:, :n_queries], loss

    def _qformer(self, batch: Batch, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(tokens), -1, -1)
        return self.Qformer(
            query_embeds=self.text_embeddings(input_ids=batch.input_ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=tokens,
        ).last_hidden_state

    def _similarity(self, batch: Batch, queries: torch.Tensor) -> torch.Tensor:
        """Cosine similarity over temperature, image i (its best query) against text j: [B, B]."""
        text = self.Qformer(
            query_embeds=self.text_embeddings(input_ids=batch.input_ids),
            query_length=0,
            attention_mask=(batch.input_ids != self.pad_token_id).long(),
        ).last_hidden_state[:, 0]
        image_feats = F.normalize(self.vision_proj(queries), dim=-1)
        text_feats = F.normalize(self.text_proj(text), dim=-1)
        return torch.einsum("iqd,jd->ijq", image_feats, text_feats).amax(-1) / self.temp

    @staticmethod
    def _contrastive(similarity: torch.Tensor) -> torch.Tensor:
        targets = torch.arange(len(similarity), device=similarity.device)
        both = F.cross_entropy(similarity, targets, label_smoothing=0.1) + F.cross_entropy(
            similarity.T, targets, label_smoothing=0.1
        )
        return both / 2

    def _matching(self, batch: Batch, tokens: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
        """Mean loss of telling (image, its text) from (image, similar text) and (similar image, text)."""
        rows = len(tokens)
        if rows == 1:  # no negatives to be had
            return similarity.sum() * 0.0
        with torch.no_grad():
            weights = similarity.float().clone().fill_diagonal_(-torch.inf)
            hard_text = torch.multinomial(F.softmax(weights, 1), 1).squeeze(1)
            hard_image = torch.multinomial(F.softmax(weights.T, 1), 1).squeeze(1)
        ids = torch.cat([batch.input_ids, batch.input_ids[hard_text], batch.input_ids])
        images = torch.cat([tokens, tokens, tokens[hard_image]])
        n_queries = self.query_tokens.shape[1]
        keep = torch.cat([ids.new_ones(len(ids), n_queries), (ids != self.pad_token_id).long()], dim=1)
        queries = self.query_tokens.expand(len(ids), -1, -1)
        out = self.Qformer(
            query_embeds=self.text_embeddings(input_ids=ids, query_embeds=queries),
            query_length=n_queries,
            attention_mask=keep,
            encoder_hidden_states=images,
        ).last_hidden_state[:, :n_queries]
        logits = self.itm_head(out).mean(1)
        targets = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        targets[:rows] = 1
        return F.cross_entropy(logits, targets)
