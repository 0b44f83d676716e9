"""LAVIS's own API: models, processors and datasets by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lavis.config.compat.dataset_section import DATASETS
from lavis.config.init import Init
from lavis.config.recipe import load_dataset_config, load_model_config, load_preprocess_config, model_types
from lavis.config.schema import PreprocessConfig
from lavis.core.paths import CONFIGS_ROOT
from lavis.core.registries import MODELS, SOURCES

if TYPE_CHECKING:
    import torch

    from lavis.core.types import Conversation


def load_model(
    name: str,
    model_type: str = "default",
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | None = None,
) -> torch.nn.Module:
    """The model `name` of `model_type` with its weights, on `device`; `checkpoint` is a file of trained parts.

    Raises ConfigError or RegistryError for unknown names, CheckpointError for missing weights.
    """
    config = load_model_config(name, model_type)
    init = {} if checkpoint is None else {"init": [Init(checkpoint)]}
    model = MODELS.get(config.arch).from_config(config, device=device, **init)
    return model.train(not is_eval).to(device)


def load_preprocess(config: PreprocessConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(image processors, text processors) of a `preprocess` section, each a dict with `train` and `eval`."""
    from lavis.data.image import image_processor
    from lavis.data.text import text_processor

    vis, txt = config.vis_processor, config.text_processor
    images = {"train": image_processor(vis.train), "eval": image_processor(vis.eval)}
    return images, {"train": text_processor(txt.train), "eval": text_processor(txt.eval)}


def load_model_and_preprocess(
    name: str, model_type: str = "default", is_eval: bool = False, device: str | torch.device = "cpu"
) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    """The model with the image and text processors that its default YAML names."""
    vis_processors, txt_processors = load_preprocess(load_preprocess_config(name, model_type))
    return load_model(name, model_type, is_eval, device), vis_processors, txt_processors


def load_dataset(
    name: str, cfg_path: str | None = None, vis_path: str | None = None, data_type: str | None = None
) -> dict[str, list[Conversation]]:
    """Split name to the conversations of the dataset `name`.

    `cfg_path` overrides its default YAML with a file that has `datasets.<name>`; `vis_path` is the image folder;
    `data_type` replaces the one of the YAML. Raises DataError for missing or unreadable annotations.
    """
    data: dict[str, list[Conversation]] = {}
    for split, entry in load_dataset_config(name, cfg_path).items():
        images = None if data_type == "text" else vis_path or entry.images
        source = SOURCES.get(entry.source)(replace(entry, images=images), f"datasets.{name}", split)
        data[split] = list(source.examples())
    return data


class ModelZoo:
    """Architectures and their types; printing it gives a table, iterating gives (architecture, types)."""

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        folders = sorted(path.name for path in (CONFIGS_ROOT / "models").iterdir() if model_types(path.name))
        types = {folder: model_types(folder) for folder in folders}
        return ((name, t) for name, t in types.items() if load_model_config(name, t[0]).arch in MODELS)

    def __str__(self) -> str:
        return _table(("Architectures", "Types"), [(arch, ", ".join(types)) for arch, types in self])


class DatasetZoo:
    """Datasets and the splits of their default YAML; printing it gives a table, iterating gives (dataset, splits)."""

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return ((name, list(load_dataset_config(name))) for name in sorted(DATASETS))

    def __str__(self) -> str:
        return _table(("Datasets", "Splits"), [(name, ", ".join(splits)) for name, splits in self])


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    width = max(len(first) for first, _ in [head, *rows]) + 2
    rule = "=" * 50
    lines = [f"{first:{width}}{second}".rstrip() for first, second in [head, *rows]]
    return "\n".join([rule, lines[0], rule, *lines[1:]])


model_zoo = ModelZoo()
dataset_zoo = DatasetZoo()
