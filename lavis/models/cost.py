"""What a training step costs: floating-point operations of each part of a model, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lavis.common.errors import ConfigError
from lavis.models.configs import MiniGPT4QwenConfig
from lavis.models.vision import build_qformer, build_vit


@dataclass(frozen=True)
class Costs:
    """FLOPs of one sample, forward and backward: what comes before the LLM's blocks, one block, and what comes behind them; parameters likewise."""

    front: float
    block: float
    back: float
    front_parameters: int
    block_parameters: int
    back_parameters: int


def sample_costs(config: MiniGPT4QwenConfig, llm_config: PreTrainedConfig, *, tokens: int, supervised: int, images: int = 1) -> Costs:
    """Costs of a sample of `tokens` tokens with `supervised` labels and `images` images. Nothing is allocated.

    A matrix costs 2 FLOPs a weight and token forward, as many for the gradient of its input and, if it is trained, of itself.
    """
    with init_empty_weights():
        vit, qformer = build_vit(config), build_qformer(config, config.vit_dimensions()["embed_dim"])
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=torch.float32)
    layer = sum(p.numel() for p in llm.base_model.layers[0].parameters())
    head = llm.get_output_embeddings().weight.numel()
    vit_size, qformer_size = (sum(p.numel() for p in m.parameters()) for m in (vit, qformer))
    patches = (config.image_size // config.vit_dimensions()["patch_size"]) ** 2 + 1
    passes = 4 if config.freeze_llm else 6  # forward, gradient of the input, gradient of the weights
    again = 2 if config.llm_grad_checkpoint else 0
    attention = 2 * 2 * tokens * llm_config.hidden_size * tokens / 2 * (passes + again) / 2
    seen = images * (2 if config.freeze_vit else 6) * vit_size * patches + images * (2 if config.freeze_qformer else 6) * qformer_size * config.num_query_token
    projection = config.qformer.hidden_size * llm_config.hidden_size
    return Costs(
        front=seen + images * 6 * projection * config.num_query_token,
        block=(passes + again) * layer * tokens + attention,
        back=passes * head * supervised,
        front_parameters=vit_size + qformer_size + projection + llm.get_input_embeddings().weight.numel(),
        block_parameters=layer,
        back_parameters=head + llm_config.hidden_size,
    )


def balanced(costs: Costs, blocks: int, stages: int) -> list[int]:
    """Blocks of each stage, at least one, such that the dearest stage is as cheap as can be. Raises ConfigError for more stages than blocks."""
    if stages > blocks:
        raise ConfigError(f"{stages} stages but the LLM has {blocks} blocks: choose --num-stages of at most that.")
    if stages == 1:
        return [blocks]

    def price(sizes: list[int]) -> float:
        extra = [costs.front, *[0.0] * (stages - 2), costs.back]
        return max(n * costs.block + more for n, more in zip(sizes, extra, strict=True))

    splits: list[list[int]] = []
    for first in range(1, blocks - stages + 2):
        for last in range(1, blocks - first - (stages - 2) + 1):
            inner, rest = blocks - first - last, stages - 2
            if (rest == 0) != (inner == 0):
                continue
            middle = [inner // rest + (i < inner % rest) for i in range(rest)] if rest else []
            splits.append([first, *middle, last])
    return min(splits, key=price)
