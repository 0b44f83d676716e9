"""A model cut into stages: each holds a range of the LLM's blocks; the first also vision tower, projection and
embeddings, the last the final norm and the head.

A stage is built and loaded by itself: the host that runs it never holds the other blocks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lavis.config.init import Init
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.paths import resolve
from lavis.models.adapters import add_lora
from lavis.models.attention import prepare
from lavis.models.composition import public_name
from lavis.models.configs import VlmConfig
from lavis.models.initial import load_initial
from lavis.models.llm import build_llm, hidden_states, recompute_activations
from lavis.models.parts import LlmConfig
from lavis.models.scoring import Scorer
from lavis.models.vlm import Vlm
from lavis.weights.gguf import is_gguf
from lavis.weights.qwen1 import open_qwen1
from lavis.weights.qwen1_format import is_qwen1
from lavis.weights.shards import LazyTensor, Shards

SPLITTABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose blocks know nothing of how many come before them."""
_LAYER = re.compile(r"(\.layers\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Part:
    """Stage `index` of `count`: blocks `start` to `end` (exclusive) of the LLM."""

    index: int
    count: int
    start: int
    end: int

    @property
    def is_first(self) -> bool:
        """Whether it has the vision tower, the projection and the embeddings."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.index == self.count - 1

    def whole_name(self, name: str) -> str:
        """The name that the stage's tensor `name` has in the whole model."""
        return _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + self.start}", name)


def cut(sizes: Sequence[int]) -> list[Part]:
    """Stages of so many blocks each, in order."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [Part(i, len(sizes), end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def open_llm(name: str) -> tuple[PreTrainedConfig, dict[str, LazyTensor]]:
    """Configuration and tensors, read when indexed, of the LLM in the folder or on the hub under `name`.

    Raises CheckpointError if there is none, and ConfigError for one that can't be cut into stages.
    """
    folder = resolve(name)
    if is_gguf(name):
        raise ConfigError(
            f"model.llm.weights {name}: a GGUF file can't be cut into stages. Take the model's safetensors folder."
        )
    if not folder.exists():
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if is_qwen1(folder):
        return open_qwen1(folder)
    config = AutoConfig.from_pretrained(folder)
    _check_splittable(config, f"model.llm.weights {name}")
    shards = Shards(folder)
    return config, {key: LazyTensor(shards, key) for key in shards.shapes}


def _check_splittable(config: PreTrainedConfig, name: str) -> None:
    if config.model_type not in SPLITTABLE:
        raise ConfigError(
            f"{name} is a {config.model_type}; stages are known for {', '.join(SPLITTABLE)} and first-generation Qwen."
        )


def open_llm_of(config: LlmConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedConfig, Mapping[str, Any]]:
    """As `open_llm`, of a recipe's section; a new LLM gets its values here, the same on every rank of one seed."""
    if config.weights:
        return open_llm(config.weights)
    llm = build_llm(config, tokenizer, torch.float32)
    _check_splittable(llm.config, "model.llm.config")
    return llm.config, llm.state_dict()


def llm_part(config: PreTrainedConfig, part: Part, dtype: torch.dtype) -> PreTrainedModel:
    """The blocks of `part` as a causal LM of its own whose parameters are on the meta device; norm, head and embeddings
    only where they belong.
    """
    own = copy.deepcopy(config)
    own.num_hidden_layers = part.end - part.start
    if getattr(own, "layer_types", None):
        own.layer_types = list(own.layer_types[part.start : part.end])
    # tied on two ranks, each has a copy of its own; that is right as long as they are frozen (Pipeline.build)
    own.tie_word_embeddings = config.tie_word_embeddings and part.is_first and part.is_last
    with init_empty_weights(include_buffers=False):
        llm = AutoModelForCausalLM.from_config(own, dtype=dtype)
    if not part.is_first:
        llm.base_model.embed_tokens = None
    if not part.is_last:
        llm.base_model.norm = nn.Identity()
        llm.lm_head = None
    return llm.eval()


def load_part(llm: PreTrainedModel, part: Part, tensors: Mapping[str, Any], name: str, device: torch.device) -> None:
    """Give the meta parameters of `llm` their values, one tensor after another, on `device`.

    Raises CheckpointError naming what is missing.
    """
    sources = {key: part.whole_name(key) for key, _ in llm.named_parameters()}
    if part.is_last and "lm_head.weight" not in tensors:  # tied
        sources["lm_head.weight"] = "model.embed_tokens.weight"
    if missing := sorted(source for source in sources.values() if source not in tensors):
        raise CheckpointError(
            f"{name} lacks {', '.join(missing[:8])}, which stage {part.index} of {part.count} needs. Download it again."
        )
    # the largest first, while there is little else beside its file
    for key in sorted(sources, key=lambda key: -llm.get_parameter(key).numel()):
        source = sources[key]
        owner, _, leaf = key.rpartition(".")
        module = llm.get_submodule(owner)
        old = getattr(module, leaf)
        value = tensors[source][...]
        if value.shape != old.shape:
            raise CheckpointError(f"{name}: {source} is {list(value.shape)}, the configuration says {list(old.shape)}.")
        setattr(module, leaf, nn.Parameter(value.to(device, old.dtype), requires_grad=old.requires_grad))


class Stage(nn.Module):
    """One stage. First: [input_ids, position_ids, images] -> (hidden, position_ids); others take that pair; the last
    gives hidden alone.

    images: pixel_values [N, 3, S, S] or features [N, Q, D], N may be 0 for the latter. What crosses a boundary is one
    float tensor and
    integer positions; masks and rotary tables are made from these on each stage.
    """

    def __init__(
        self,
        config: VlmConfig,
        llm: PreTrainedModel,
        part: Part,
        image_token_id: int | None,
        init: Sequence[Init] = (),
    ) -> None:
        super().__init__()
        self.config, self.part = config, part
        prepare(llm)
        if part.is_first:
            self.front = Vlm(config, llm, image_token_id, on_meta=True)
            filled = self.front.load_weights()
        else:
            self.llm_model = llm.requires_grad_(config.llm.train == "full")
            if config.llm.train == "lora":
                add_lora(llm, config.llm.lora, lambda name: part.whole_name(f"llm_model.{name}"))
            if config.llm.recomputes:
                recompute_activations(llm)
            filled = {name for name, _ in self.whole_names()}
        for item in init:
            tower = self.front.visual_encoder if part.is_first else None
            load_initial(dict(self.whole_names()), item, tower, filled, self._is_elsewhere)
        if not any(p.requires_grad for p in self.parameters()):
            # an optimiser wants a parameter; this one has no part in anything
            self.anchor = nn.Parameter(torch.zeros(1))

    def _is_elsewhere(self, name: str) -> bool:
        """Whether another stage has the tensor of that name in the whole model."""
        if not name.startswith("llm_model."):
            return not self.part.is_first
        block = _LAYER.search(name)
        return not self.part.start <= int(block[2]) < self.part.end if block else name not in dict(self.whole_names())

    @property
    def llm(self) -> PreTrainedModel:
        """The stage's blocks."""
        return self.front.llm_model if self.part.is_first else self.llm_model

    def train(self, mode: bool = True) -> Stage:
        """Frozen parts stay in eval mode, as in Vlm."""
        super().train(mode)
        if not self.part.is_first:
            trained = any(p.requires_grad for p in self.llm_model.parameters())
            self.llm_model.train(mode and (trained or self.config.llm.recomputes))
        return self

    def rate_scales(self, layer_decay: float) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self.llm.parameters(), self.config.llm.lr_scale)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As nn.Module's; those of `front` under its public names."""
        for name, p in super().named_parameters(prefix, recurse, remove_duplicate):
            front, dot, own = name.partition("front.")
            yield (f"{front}front.{public_name(own)}" if dot else name), p

    def whole_names(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under their names in the whole model, without the anchor."""
        for name, p in self.named_parameters():
            if name != "anchor":
                yield self.part.whole_name(name.removeprefix("front.")), p

    def hidden(self, embeds: torch.Tensor, **settings: Any) -> torch.Tensor:
        """The blocks: [B, L, D] -> [B, L, D]; behind the final norm in the last stage.

        `settings` go to transformers.
        """
        return self.llm.base_model(inputs_embeds=embeds, **settings).last_hidden_state

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        if self.part.is_first:
            ids, positions, images = inputs
            embeds = self.front.embed_parts(ids, images)
        else:
            embeds, positions = inputs
        # No stage but the first could be told where samples begin; the host reads it off the positions, as it has
        # waited for DeepSpeed to learn their shape anyway.
        hidden = hidden_states(self.llm, embeds, positions, in_place=self.config.llm.drops_out)
        return hidden if self.part.is_last else (hidden, positions)

    def scorer(self) -> Scorer:
        """The LLM's head. Last stage only."""
        return Scorer(self.llm)
