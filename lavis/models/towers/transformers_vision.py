"""Vision models of transformers as towers: CLIP, SigLIP, SigLIP2, DINOv2, InternViT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.registries import TOWERS
from lavis.models.llm import recompute_activations
from lavis.models.tower_configs import FAMILIES, HfVisionConfig
from lavis.models.towers.base import Tower
from lavis.weights.shards import read_source
from lavis.weights.tensors import LoadReport, load_tensors

Tensors = Mapping[str, torch.Tensor]
PUBLIC = "visual_encoder."
"""What begins a tower's names in checkpoints."""


@TOWERS.register("dinov2")
@TOWERS.register("siglip2")
@TOWERS.register("siglip")
@TOWERS.register("clip")
@TOWERS.register("hf_vision")
class TransformersVision(Tower):
    """The model's blocks up to the chosen hidden state, whose vectors are the output. What lies behind is not built."""

    config: HfVisionConfig
    model: Any  # a vision model of transformers

    def __init__(self, config: HfVisionConfig, model_config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _cut_model(config, model_config)
        assert config.image_size is not None  # the section has taken it from the files
        self._grid = config.image_size // _first(model_config.patch_size)
        if config.recompute and config.train != "frozen":
            recompute_activations(self.model)

    @classmethod
    def from_config(cls, config: HfVisionConfig) -> TransformersVision:
        values = config.values()
        family = FAMILIES[values["model_type"]]
        size = [config.image_size] * 2 if isinstance(values["image_size"], (list, tuple)) else config.image_size
        values |= {"num_hidden_layers": config.blocks(), "image_size": size, **family.settings}
        try:
            return cls(config, AutoConfig.for_model(**values))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model.tower: transformers refuses its configuration: {error}") from error

    def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        if self.model.config.model_type == "siglip2_vision_model":
            states = self.model(**self._patches(pixels_NCHW)).last_hidden_state
        else:
            states = self.model(pixel_values=pixels_NCHW).last_hidden_state
        prefix = states.shape[1] - self._grid**2
        return states[:, prefix:] if self.config.class_token == "drop" else states

    def load(self, source: str) -> LoadReport:
        """From a folder, a name on the hub or a weight file; a whole CLIP or the like is taken too."""
        found, left_out = self.own_tensors(read_source(source))
        fitted = self.fit(found)
        report = load_tensors(
            self.model,
            fitted,
            file=source,
            wanted=lambda name: True,
            ignored=lambda name: name in left_out,
            prefix=PUBLIC,
            resized=[name for name in found if fitted[name] is not found[name]],
        )
        self.complete()
        return report

    def layers(self) -> Iterator[nn.Module]:
        yield from _blocks(self.model)

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        if self.model.config.model_type != "siglip2_vision_model":
            return []
        return [(self.model.embeddings, self.model.embeddings.position_embedding.weight)]  # resized at every call

    def complete(self) -> None:
        """Position numbers are in no file."""
        missing = {name for name, buffer in self.model.named_buffers() if buffer.is_meta}
        if missing:
            shallow = self.model.config.__class__(**{**self.model.config.to_dict(), "num_hidden_layers": 1})
            with torch.device("cpu"):
                values = dict(AutoModel.from_config(shallow).named_buffers())
            for name in missing:
                module, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(module), last, values[name])

    def fit(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Position embeddings of another picture size are resized as transformers does it when it interpolates."""
        own = {PUBLIC + name: t for name, t in self.model.state_dict().items() if "position_embedding" in name}
        return {name: self._resized(t, own[name]) if name in own else t for name, t in tensors.items()}

    def _resized(self, tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if own.shape == tensor.shape or own.shape[-1] != tensor.shape[-1]:
            return tensor
        side, prefix = [self._grid, self._grid], own.shape[-2] - self._grid**2
        batch = tensor.reshape(1, -1, tensor.shape[-1])
        return resample_abs_pos_embed(batch, side, num_prefix_tokens=prefix, antialias=False).reshape(own.shape)

    def own_tensors(self, found: Tensors) -> tuple[dict[str, torch.Tensor], set[str]]:
        """`found`, a file's, by public names; and the names of those that the tower has no use for.

        What stands beside the vision model (text tensors) keeps its name and is among the latter.
        """
        prefix = _prefix(found, next(name for name in self.model.state_dict() if "patch_embed" in name))
        named: dict[str, torch.Tensor] = {}
        left_out: set[str] = set()
        for name, tensor in found.items():
            own = self._own_name(name.removeprefix(prefix))
            public = PUBLIC + own if name.startswith(prefix) else name
            named[public] = tensor
            if not name.startswith(prefix) or self._is_behind(own):
                left_out.add(public)
        return named, left_out

    def _own_name(self, name: str) -> str:
        """What the installed version of transformers calls the file's tensor `name`."""
        own = self.model.state_dict()
        for pattern, replacement in FAMILIES[self.model.config.model_type].renames:
            renamed = re.sub(pattern, replacement, name)
            name = renamed if renamed in own else name
        return name

    def _is_behind(self, name: str) -> bool:
        """Whether a tensor of the whole model is none of this one's, which ends earlier and only encodes."""
        own = self.model.state_dict()
        path = next(path for path, module in self.model.named_modules() if module is _blocks(self.model))
        block = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
        if block:
            return int(block[1]) >= self.config.blocks()
        family = FAMILIES[self.model.config.model_type]
        behind = ("head.", "pooler.", f"{family.norm}." if family.norm else "", *(f"{part}." for part in family.unused))
        # older files hold position_ids, which are 0, 1, 2, ...
        other = name.endswith(("mask_token", "position_ids")) or name.startswith(tuple(filter(None, behind)))
        return other and name not in own

    def _patches(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arguments of a model of any aspect ratio, for squares: flat patches [N, T, P*P*3], all of them real."""
        size, grid = self.model.config.patch_size, self._grid
        patches = pixels.unflatten(3, (grid, size)).unflatten(2, (grid, size)).permute(0, 2, 4, 3, 5, 1)
        shape = np.full((len(pixels), 2), grid)  # is read number by number: as a tensor it would wait for the GPU
        mask = torch.ones(len(pixels), grid * grid, dtype=torch.long, device=pixels.device)
        return {
            "pixel_values": patches.reshape(len(pixels), grid * grid, -1),
            "pixel_attention_mask": mask,
            "spatial_shapes": shape,
        }


def _cut_model(config: HfVisionConfig, model_config: PreTrainedConfig) -> Any:
    """The model of `model_config` without what its patches' vectors do not need."""
    model = AutoModel.from_config(model_config)
    family = FAMILIES[model_config.model_type]
    for name in (*family.unused, *([family.norm] if family.norm and not config.final_norm else [])):
        setattr(model, name, nn.Identity())
    model.embeddings.mask_token = None  # of masked pretraining; a trained tensor without a gradient would halt DDP
    return model


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def _prefix(found: Tensors, name: str) -> str:
    """What stands in front of the model's names in a file: `vision_model.` in a whole CLIP, often nothing."""
    fits = [key.removesuffix(name) for key in found if key == name or key.endswith(f".{name}")]
    if len(fits) != 1:
        raise CheckpointError(
            f"the weights of model.tower hold {'no' if not fits else 'more than one'} tensor called {name}: is this the"
            " file of such a vision model?"
        )
    return fits[0]


def _first(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]
