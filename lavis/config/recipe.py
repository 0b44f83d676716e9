"""Recipes: one YAML file names model, data and run. Here it is merged with the defaults, checked and typed.

Later layers win: schema < lavis/configs/models/<model.preset>.yaml < the recipes that `base` names < recipe <
--options. Where a recipe has the older `datasets.<builder>`, lavis/configs/datasets/<builder>.yaml lies below it.
Nothing here imports torch: a wrong recipe is refused in a fraction of a second.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavis.config.compat import UNUSED, leaves
from lavis.config.compat.data import entry_of, splits_of
from lavis.config.compat.model import ARCHS
from lavis.config.deepspeed import with_deepspeed_section
from lavis.config.files import missing_files
from lavis.config.imports import load_imports, load_saved_imports
from lavis.config.layers import (
    SCHEMA,
    Layer,
    label,
    mention_renamed,
    merged,
    options_layer,
    origin,
    place,
    read_layer,
    resolved,
    translated,
    where,
)
from lavis.config.report import listed, report, with_older_names
from lavis.config.resolved import SECTIONS, Recipe
from lavis.config.rules import RULES
from lavis.config.schema import DataEntry, ModelConfig, PreprocessConfig
from lavis.config.shipped import find_recipe, recipe_layers, shipped_recipes
from lavis.config.typed import Problem, choices, defaults, join, read_dataclass, read_value, section_type
from lavis.core.errors import ConfigError, did_you_mean
from lavis.core.logging import warn_once
from lavis.core.paths import CONFIGS_ROOT
from lavis.core.plugins import COPIES as IMPORTS
from lavis.core.plugins import Import, load_plugins
from lavis.core.registries import MODEL_CONFIGS

__all__ = ["Recipe", "find_recipe", "load_dataset_config", "load_model_config", "load_preprocess_config", "load_recipe"]
__all__ += ["load_saved", "missing_files", "model_types", "recipe_from_dict", "shipped_recipes", "validate"]


def load_recipe(path: str | Path, options: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` (a file, or a shipped one's name such as `shapes/align`) with `a.b=value` overrides.

    Raises ConfigError listing every unknown key and wrong value, or else every impossible combination, with the fix.
    """
    file = find_recipe(path)
    user = [*recipe_layers(file), options_layer(options)]
    imports = load_imports(user)
    _check_sections(user[:-1])
    mention_renamed(translated(user)[0])
    recipe = _build([*_default_layers(user), *user], file, imports)
    _warn_unused(user)
    recipe = with_deepspeed_section(recipe)
    validate(recipe)
    return recipe


def validate(recipe: Recipe) -> None:
    """Raise ConfigError listing every combination of values in `recipe` that can't work."""
    messages = [with_older_names(message, recipe.layers) for rule in RULES for message in rule(recipe)]
    if messages:
        raise ConfigError(listed(messages, label(recipe.source)))


def recipe_from_dict(values: Mapping[str, Any], source: Path = Path("saved config")) -> Recipe:
    """The Recipe that `to_dict` made. Keys that are missing take the schema's defaults, not those of the YAML files.

    Nothing is imported for it. Raises ConfigError if the values do not fit the schema; combinations are not checked
    again.
    """
    layer = Layer(str(source), OmegaConf.create({k: v for k, v in values.items() if k != IMPORTS}))
    return _build([layer], source)


def load_saved(config: Path) -> Recipe:
    """The Recipe that `save` wrote, after importing what it imports.

    Raises ConfigError for Python that is missing or not trusted (see lavis.core.plugins), or as `recipe_from_dict`.
    """
    layer = read_layer(config)
    imports = load_saved_imports(layer, config)
    return _build([dataclasses.replace(layer, path=None)], config, imports)


def load_model_config(arch: str, model_type: str = "default", options: Sequence[str] = ()) -> ModelConfig:
    """The model section that `arch` and `model_type` (or the folder and file of a preset) mean by themselves; `options`
    are `key=value` within it.
    """
    load_plugins()
    preset = CONFIGS_ROOT / "models" / arch / f"{model_type}.yaml"
    named = {"preset": f"{arch}/{model_type}"} if preset.exists() else {"arch": arch, "model_type": model_type}
    chosen = Layer(SCHEMA, OmegaConf.create({"model": named}))
    layers = [chosen, options_layer([f"model.{o}" for o in options])]
    return _build([*_default_layers(layers), *layers], Path(arch)).model


def load_preprocess_config(arch: str, model_type: str = "default") -> PreprocessConfig:
    """The processors of a model's preset: the images' are its `media`, the texts' stand under `preprocess`."""
    path = _preset_file(f"{arch}/{model_type}")
    layers, problems = translated([read_layer(path)])
    section = resolved(layers, path).get("preprocess")
    config = read_dataclass(PreprocessConfig, section, "preprocess", problems)
    if problems:
        raise ConfigError(report(problems, layers, layers[0].label))
    model: Any = load_model_config(arch, model_type)
    if model.sees:
        config.vis_processor = model.media.processors(model.tower.image_size)
    return config


def load_dataset_config(builder: str, path: str | Path | None = None) -> dict[str, DataEntry]:
    """Name of a split to its entry, of LAVIS's section `datasets.<builder>`: its default YAML, overridden by the file
    at `path` if one is given.
    """
    user = [Layer(SCHEMA, OmegaConf.create({"datasets": {builder: {}}}))]
    layers = [*_default_layers(user), *user, *([read_layer(Path(path))] if path is not None else [])]
    problems = [p for p in translated(layers)[1] if p.key.startswith("datasets")]
    section = resolved(layers, Path(path or builder))["datasets"][builder] or {}
    entries = {
        split: read_dataclass(DataEntry, entry_of(builder, section, split), builder, problems)
        for split in splits_of(builder, section)
    }
    if problems:
        raise ConfigError(report(problems, layers, str(path or builder)))
    return entries


def model_types(arch: str) -> list[str]:
    """Names of the default YAML files of `arch`."""
    return sorted(p.stem for p in (CONFIGS_ROOT / "models" / arch).glob("*.yaml"))


def _check_sections(layers: Sequence[Layer]) -> None:
    given = {s for layer in layers for s in ("model", "data") if layer.values.get(s) is not None}
    given |= {"data"} if any(layer.values.get("datasets") for layer in layers) else set()
    missing = [s for s in ("model", "data") if s not in given]
    if missing:
        raise ConfigError(f"{layers[-1].label}: the recipe lacks the section {' and '.join(map(repr, missing))}.")


def _arch(layers: Sequence[Layer]) -> str:
    """The arch that the layers set, or the schema's. Raises ConfigError for an unknown one."""
    arch = str(_model(layers).get("arch", ModelConfig.arch))
    if arch not in MODEL_CONFIGS:
        known = MODEL_CONFIGS.list()
        hint = did_you_mean(arch, [*known, *ARCHS])
        at = f"model.arch ({where('model.arch', layers)})"
        raise ConfigError(f"{at}: unknown model {arch!r}.{hint} Known: {', '.join(known)}.")
    return arch


def _model(layers: Sequence[Layer]) -> Mapping[str, Any]:
    model = merged(layers).get("model") or {}
    if not isinstance(model, Mapping):
        raise ConfigError(f"model: {model!r} is not a mapping ({where('model', layers)}).")
    return model


def _default_layers(user: Sequence[Layer]) -> list[Layer]:
    """The YAML files below the user's layers: the model's, the datasets'. As they are written, as `user` is."""
    today = translated(user)[0]
    preset = _model(today).get("preset")
    files = [_preset_file(str(preset), place("model.preset", today))] if preset else []
    files += [p for name in _dataset_names(user) if (p := CONFIGS_ROOT / "datasets" / f"{name}.yaml").exists()]
    return [read_layer(p) for p in files]


def _dataset_names(written: Sequence[Layer]) -> list[str]:
    """Names in the older section `datasets`, whose default YAML files lie below the recipe."""
    names: dict[str, None] = {}
    if any(isinstance((layer.plain.get("data") or {}).get("train"), list) for layer in written):
        return []  # options that change single entries
    for layer in written:
        datasets = layer.plain.get("datasets") or {}
        if not isinstance(datasets, Mapping):
            raise ConfigError(f"datasets: {datasets!r} is not a mapping of dataset names ({layer.label}).")
        names |= dict.fromkeys(map(str, datasets))
    return list(names)


def _preset_file(preset: str, written: tuple[str, str] = ("model.preset", "")) -> Path:
    """The YAML file of a preset. Raises ConfigError naming the nearest; `written`: its key and where it stands."""
    path = CONFIGS_ROOT / "models" / f"{preset}.yaml"
    if path.exists():
        return path
    folder, _, name = preset.rpartition("/")
    key, at = written
    start = f"{key} ({at}): " if at else f"{key}: "
    known = model_types(folder)
    if not known:
        folder = folder or preset
        known = sorted(p.name for p in (CONFIGS_ROOT / "models").iterdir() if p.is_dir())
        raise ConfigError(f"{start}unknown model {folder!r}.{did_you_mean(folder, known)} Known: {', '.join(known)}.")
    raise ConfigError(f"{start}{folder} has no type {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _section_type(name: str, layers: Sequence[Layer]) -> Any:
    """The type of a section in a recipe of these layers."""
    return MODEL_CONFIGS.get(_arch(layers)) if name == "model" else SECTIONS[name]


def _schema_layer(layers: Sequence[Layer]) -> Layer:
    """The defaults of every key that a recipe of these layers can have."""
    given = merged(layers)
    values: dict[str, Any] = {}
    for name in SECTIONS:
        cls, section = section_type(_section_type(name, layers)), given.get(name)
        values[name] = defaults(cls, section if isinstance(section, Mapping) else {}) if cls else []
    values["model"]["arch"] = _arch(layers)
    return Layer(SCHEMA, OmegaConf.create(values))


def _build(written: Sequence[Layer], source: Path, imports: tuple[Import, ...] = ()) -> Recipe:
    """Translate, merge, resolve interpolations, check against the schema."""
    layers, problems = translated(written)
    for layer in layers:
        layer.values.pop("preprocess", None)
    layers = _with_defaults(layers)
    values = resolved(layers, source)
    problems += [Problem(str(k), "unknown section", tuple(SECTIONS)) for k in values if k not in SECTIONS]
    sections = {name: read_value(_section_type(name, layers), values[name], name, problems) for name in SECTIONS}
    if problems:
        raise ConfigError(report(problems, layers, label(source)))
    recipe = Recipe(**sections, source=source, origins={}, imports=imports, layers=layers)
    recipe.origins.update({key: origin(key, layers).label for key in recipe.flat()})
    recipe.origins.update((IMPORTS, item.place) for item in imports)
    return recipe


def _with_defaults(layers: Sequence[Layer]) -> list[Layer]:
    """The layers above the schema's, less what they say about parts that another one above them takes the place of."""
    chosen = [choice for name in SECTIONS for choice in choices(_section_type(name, layers), name)]
    for choice in chosen:
        layers = _without_replaced(layers, choice.key, choice.default)
    schema, optional = _schema_layer(layers), [choice.key for choice in chosen if choice.optional]
    return [schema, *(_without_empty_sections(layer, schema, optional) for layer in layers)]


def _without_replaced(layers: Sequence[Layer], key: str, default: str) -> list[Layer]:
    """The layers, where one that names another part in the section `key` hides the sections of all below it."""
    result, current = list(layers), default
    for i, layer in enumerate(layers):
        name = OmegaConf.select(layer.values, f"{key}.name", throw_on_resolution_failure=False)
        if name is not None and name != current:
            result[:i] = [_without(below, key) for below in result[:i]]
            current = name
    return result


def _without(layer: Layer, key: str) -> Layer:
    section, _, name = key.rpartition(".")
    plain = copy.deepcopy(layer.plain)
    (plain.get(section, {}) if section else plain).pop(name, None)
    return dataclasses.replace(layer, values=OmegaConf.create(plain))


def _without_empty_sections(layer: Layer, schema: Layer, kept: Collection[str]) -> Layer:
    """The layer less its sections that are null (`vis_processor:` with nothing below): they would hide the defaults.

    In the sections `kept`, null means that there is no such part.
    """

    def strip(values: Mapping[Any, Any], below: Mapping[str, Any], key: str) -> dict[Any, Any]:
        sections = {name for name, value in below.items() if isinstance(value, Mapping) and value}
        result = {n: v for n, v in values.items() if v is not None or n not in sections or join(key, n) in kept}
        inner = {
            n: strip(v, below[n], join(key, n)) for n, v in result.items() if n in sections and isinstance(v, Mapping)
        }
        return result | inner

    return dataclasses.replace(layer, values=OmegaConf.create(strip(layer.plain, schema.plain, "")))


def _warn_unused(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for key, value in leaves(layer.plain):
            if key in UNUSED and value is not None:
                warn_once(f"{key} ({layer.label}) has no effect any more: {UNUSED[key]}.")
