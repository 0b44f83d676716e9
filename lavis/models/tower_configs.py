"""Sections of the vision towers that other libraries bring: transformers' and timm's. Torch-free.

What a tower's files say (width, patches, picture size) is read from their config.json, never from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Optional

from lavis.config.schema import NamedFile, opt
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.json_file import read_json
from lavis.core.paths import resolve
from lavis.models.parts import TowerConfig
from lavis.weights.hub import local_folder

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


class Family(NamedTuple):
    """What a model type of transformers does that its config.json does not say.

    prefix: vectors before those of the patches (class token; registers are counted by the configuration).
    norm: its final norm, if `last_hidden_state` has it. unused: parts that only pooled outputs need.
    defaults: of transformers' configuration class, which files leave out. settings: without what no patch needs.
    renames: names in files (pattern, replacement) where transformers' own version 5 calls a tensor otherwise.
    rgb: mean and standard deviation in the published training, for weights without preprocessor_config.json; empty:
    CLIP's.
    """

    prefix: int
    norm: str
    unused: tuple[str, ...]
    defaults: dict[str, Any]
    settings: Mapping[str, Any] = MappingProxyType({})
    renames: tuple[tuple[str, str], ...] = ()
    rgb: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = Family(
    1, "", ("post_layernorm",), {"hidden_size": 768, "image_size": 224, "patch_size": 32, "num_hidden_layers": 12}
)
_DINO_NAMES = (
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
_BASE = {"hidden_size": 768, "image_size": 224, "num_hidden_layers": 12}
FAMILIES: dict[str, Family] = {
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "siglip_vision_model": Family(
        0, "post_layernorm", (), {**_BASE, "patch_size": 16}, settings={"vision_use_head": False}, rgb=_HALF
    ),
    # the variant of any aspect ratio; SigLIP2's checkpoints of one resolution are of type siglip
    "siglip2_vision_model": Family(
        0,
        "post_layernorm",
        (),
        {**_BASE, "patch_size": 16, "num_patches": 256},
        settings={"vision_use_head": False},
        rgb=_HALF,
    ),
    "dinov2": Family(
        1,
        "layernorm",
        (),
        {**_BASE, "patch_size": 14},
        settings={"use_mask_token": False},
        renames=_DINO_NAMES,
        rgb=_IMAGENET,
    ),
    "dinov2_with_registers": Family(
        1, "layernorm", (), {**_BASE, "patch_size": 16, "num_register_tokens": 4}, renames=_DINO_NAMES, rgb=_IMAGENET
    ),
    "internvl_vision": Family(
        1,
        "layernorm",
        (),
        {"hidden_size": 1024, "image_size": [448, 448], "patch_size": [14, 14], "num_hidden_layers": 24},
        rgb=_IMAGENET,
    ),
}
"""Vision models of transformers that a tower can be, by model_type."""
VISION_TYPE = {
    "clip": "clip_vision_model",
    "metaclip_2": "metaclip_2_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "internvl": "internvl_vision",
}
"""model_type of a checkpoint that holds text too, to that of its vision half (older files do not say it)."""


@dataclass
class HfVisionConfig(TowerConfig):
    """A vision model of transformers: a folder with config.json and weights, or a name on the hub.

    The weights may be a whole CLIP or SigLIP, whose text half is left out.
    """

    weights: Optional[str] = opt(
        None, "folder with config.json and weights, name on the hub, or a weight file beside `config`; null: random"
    )
    config: dict[str, Any] = opt(
        {}, "transformers configuration where `weights` brings none: model_type, hidden_size, ..."
    )
    layer: int = opt(
        -2, "hidden state that is taken: -1 is behind the last block, -2 behind the last but one, 3 behind the third"
    )
    final_norm: bool = opt(False, "put the model's final norm behind it (CLIP's patches have none)")
    class_token: str = opt("drop", "vectors that stand for no patch: class token, registers", choices=("drop", "keep"))
    image_size: Optional[int] = opt(  # type: ignore[assignment]  # null only until the files are read
        None, "side of the square a picture becomes, pixels; null = that of the files; others resize positions"
    )

    def __post_init__(self) -> None:
        # from here on every reader sees a number, except where the files are still to come
        if self.image_size is None and (self.config or self.config_file()):
            self.image_size = self._own_image_size()

    def span(self) -> int:
        values = self.values()
        patch, family = _side(values["patch_size"]), FAMILIES[values["model_type"]]
        prefix = family.prefix + values.get("num_register_tokens", 0) if family.prefix else 0
        return (self._side() // patch) ** 2 + (prefix if self.class_token == "keep" else 0)

    def width(self) -> int:
        return self.values()["hidden_size"]

    def pixels(self) -> tuple[list[float] | None, list[float] | None]:
        """What preprocessor_config.json beside the weights says, else what the published models of its type have."""
        if not (self.config or self.config_file()):
            return None, None
        said, (mean, std) = self._preprocessor(), FAMILIES[self.values()["model_type"]].rgb
        return said.get("image_mean") or list(mean) or None, said.get("image_std") or list(std) or None

    def blocks(self) -> int:
        """Blocks up to the chosen hidden state; the others are neither built nor loaded."""
        depth = self.values()["num_hidden_layers"]
        chosen = self.layer if self.layer > 0 else depth + 1 + self.layer
        if not 1 <= chosen <= depth:
            raise ConfigError(
                f"model.tower.layer is {self.layer}, but the tower has {depth} blocks: 1 to {depth}, or -1 to {-depth}."
            )
        return chosen

    def with_depth(self, blocks: int) -> HfVisionConfig:
        """The same tower with so many blocks and random weights."""
        return replace(self, weights=None, config=self.values() | {"num_hidden_layers": blocks}, layer=blocks)

    def without_files(self) -> HfVisionConfig:
        return replace(self, weights=None, config=self.values())

    def problems(self, key: str) -> Iterator[str]:
        if not self.weights and not self.config:
            yield f"{key}.weights names no tower and {key}.config has no dimensions of a new one: give either."
        elif self.config or self.config_file():
            patch, size = _side(self.values()["patch_size"]), self._side()
            # a convolution leaves out pixels that fill no patch: SigLIP-so400m has 27 x 14 of 384
            if size < patch or (size % patch and "num_patches" in self.values()):
                yield f"{key}.image_size is {self.image_size}, which is no multiple of the patch size {patch}."
            self.blocks()

    def files(self, key: str) -> Iterator[NamedFile]:
        if self.weights:
            yield NamedFile(f"{key}.weights", _kind(self.weights), self.weights)

    def values(self) -> dict[str, Any]:
        """transformers' configuration of the vision model, `model_type` and dimensions always among it.

        Raises CheckpointError if the files are not there, ConfigError if the type is not one of FAMILIES.
        """
        file = self.config_file()
        if self.weights and not self.config and file is None:
            raise CheckpointError(
                f"model.tower.weights: {self.weights!r} has no {CONFIG} (looked in {resolve(self.weights)} and in the"
                " hub client's cache). Fetch it with `lavis weights RECIPE --download`, or give model.tower.config."
            )
        values = _vision_half(read_json(file) if file else self.config)
        family = FAMILIES.get(values["model_type"])
        if family is None:
            raise ConfigError(
                f"model.tower: a {values['model_type']!r} cannot be a tower. Known: {', '.join(FAMILIES)}; ViTs of timm"
                " are read by `name: timm`."
            )
        return family.defaults | values

    def config_file(self) -> Path | None:
        """config.json of `weights`; None if there is none on this machine."""
        folder = local_folder(self.weights) if self.weights else None
        return folder / CONFIG if folder and (folder / CONFIG).is_file() else None

    def _preprocessor(self) -> dict[str, Any]:
        folder = local_folder(self.weights) if self.weights else None
        return read_json(folder / PREPROCESSOR) if folder and (folder / PREPROCESSOR).is_file() else {}

    def _own_image_size(self) -> int:
        values = self.values()
        if "num_patches" in values:  # the type of any aspect ratio has a number of patches instead
            return round(values["num_patches"] ** 0.5) * values["patch_size"]
        return _side(values["image_size"])

    def _side(self) -> int:
        return self.image_size or self._own_image_size()


@dataclass
class ClipConfig(HfVisionConfig):
    """CLIP as LLaVA takes it: the last hidden state but one, without the class token."""


@dataclass
class SiglipConfig(HfVisionConfig):
    """SigLIP and SigLIP2: the whole model, final norm included."""

    layer: int = opt(-1, "hidden state that is taken: -1 is behind the last block, -2 behind the last but one, ...")
    final_norm: bool = opt(True, "put the model's final norm behind it")


@dataclass
class Dinov2Config(SiglipConfig):
    """DINOv2: the whole model, final norm included, without class token and registers."""


@dataclass
class TimmConfig(TowerConfig):
    """A ViT of timm by its name there."""

    model: str = opt("", "name of the model in timm, such as vit_base_patch16_siglip_224")
    weights: Optional[str] = opt(
        None, "weight file, folder or hub name (timm/vit_base_patch16_siglip_224.webli); null: random"
    )
    layer: int = opt(-1, "output that is taken: -1 is of the last block, -2 of the last but one, 3 of the third")
    final_norm: bool = opt(True, "put the model's final norm behind it")
    class_token: str = opt("drop", "vectors that stand for no patch: class token, registers", choices=("drop", "keep"))
    image_size: Optional[int] = opt(  # type: ignore[assignment]  # null only until the files are read
        None, "side of the square a picture becomes, pixels; null = that of the model; others resize positions"
    )

    def __post_init__(self) -> None:
        if self.image_size is None and not any(self.problems("")):  # as in HfVisionConfig
            self.image_size = self._dimensions().image_size

    def span(self) -> int:
        dimensions = self._dimensions()
        return dimensions.patches + (dimensions.prefix if self.class_token == "keep" else 0)

    def width(self) -> int:
        return self._dimensions().width

    def blocks(self) -> int:
        """Blocks up to the chosen one; the others are neither built nor loaded."""
        depth = self._dimensions().depth
        chosen = self.layer if self.layer > 0 else depth + 1 + self.layer
        if not 1 <= chosen <= depth:
            raise ConfigError(f"model.tower.layer is {self.layer}, but {self.model} has {depth} blocks.")
        return chosen

    def with_depth(self, blocks: int) -> TimmConfig:
        """The same tower with its first `blocks` blocks and random weights."""
        return replace(self, weights=None, layer=blocks)

    def problems(self, key: str) -> Iterator[str]:
        if not self.model:
            yield f"{key}.model names no ViT of timm: set it, for example to vit_base_patch16_siglip_224."
            return
        from timm.models import is_model, list_models

        if not is_model(self.model):
            near = ", ".join(list_models(f"*{self.model}*")[:3])
            yield f"{key}.model: timm has no {self.model!r}." + (f" Did you mean {near}?" if near else "")

    def files(self, key: str) -> Iterator[NamedFile]:
        if self.weights:
            yield NamedFile(f"{key}.weights", _kind(self.weights), self.weights)

    def pixels(self) -> tuple[list[float] | None, list[float] | None]:
        """What timm's own settings of the model say."""
        if any(self.problems("")):
            return None, None
        return list(self._dimensions().mean), list(self._dimensions().std)

    def _dimensions(self) -> Any:
        from lavis.models.towers.timm_sizes import dimensions

        return dimensions(self.model, self.image_size)


def _vision_half(values: dict[str, Any]) -> dict[str, Any]:
    """The vision configuration inside that of a whole CLIP, SigLIP or InternVL."""
    half = values.get("vision_config", values)
    inner = half.get("model_type", values.get("model_type", ""))
    return {**half, "model_type": VISION_TYPE.get(inner, inner)}


def _side(size: int | list[int]) -> int:
    """The side of a square that a configuration gives as one number or as two."""
    return size if isinstance(size, int) else size[0]


def _kind(weights: str) -> str:
    """A single file, or a folder as an LLM's: that may be a name on the hub."""
    return "weights" if Path(weights).suffix in (".safetensors", ".bin", ".pth", ".pt") else "llm"
