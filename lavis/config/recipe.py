"""Recipes: one YAML file names model, data and run. Here it is merged with the defaults, checked and typed.

Later layers win: schema < lavis/configs/models/<arch>/<model_type>.yaml < recipe < --options. Where a recipe has the
older `datasets.<builder>`, lavis/configs/datasets/<builder>.yaml lies below it.
Nothing here imports torch: a wrong recipe is told in a fraction of a second.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lavis.config.compat import leaves
from lavis.config.compat.data import entry_of, splits_of
from lavis.config.deepspeed import DEEPSPEED_RUNNERS, shared_values
from lavis.config.files import missing_files
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
from lavis.config.rules import RULES
from lavis.config.schema import (
    DataConfig,
    DataEntry,
    ModelConfig,
    PreprocessConfig,
    ProcessorConfig,
    ProcessorPair,
    RunConfig,
)
from lavis.config.typed import Problem, choices, defaults, iter_fields, join, read_dataclass
from lavis.core.errors import ConfigError, RegistryError, did_you_mean
from lavis.core.logging import warn_once
from lavis.core.paths import CONFIGS_ROOT, PROJECTS_ROOT
from lavis.core.registries import MODEL_CONFIGS
from lavis.models.parts import MediaConfig

__all__ = ["Recipe", "find_recipe", "load_dataset_config", "load_model_config", "load_preprocess_config", "load_recipe"]
__all__ += ["missing_files", "model_types", "recipe_from_dict", "shipped_recipes", "validate"]

SECTIONS = ("model", "init", "data", "run")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `origins` says for each dotted key where its value comes from."""

    model: ModelConfig
    data: DataConfig
    run: RunConfig
    source: Path
    origins: dict[str, str]
    init: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values; `recipe_from_dict` reads them back."""
        return {
            "model": dataclasses.asdict(self.model),
            "init": self.init,
            "data": dataclasses.asdict(self.data),
            "run": dataclasses.asdict(self.run),
        }

    def to_yaml(self) -> str:
        """The sections as YAML, in the schema's order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Dotted key to value; lists and empty mappings count as values."""
        return dict(leaves(self.to_dict()))


def load_recipe(path: str | Path, options: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` (a file, or a shipped one's name such as `shapes/align`) with `a.b=value` overrides.

    Raises ConfigError listing every unknown key and wrong value, or else every impossible combination, with the mend.
    """
    file = find_recipe(path)
    user = [read_layer(file), options_layer(options)]
    _check_sections(user[0])
    mention_renamed(translated(user)[0])
    recipe = _build([*_default_layers(user), *user], file)
    _warn_unused(recipe)
    recipe = with_deepspeed_section(recipe)
    validate(recipe)
    return recipe


def with_deepspeed_section(recipe: Recipe) -> Recipe:
    """`recipe` with what its run.deepspeed_config says about keys of `run` that nothing else sets.

    Where both say something else, `run` holds and a warning names the two. Only for runners that use DeepSpeed.
    """
    if recipe.run.runner not in DEEPSPEED_RUNNERS:
        return recipe
    adopted: dict[str, Any] = {}
    for key, name, value in shared_values(recipe.run.deepspeed_config):
        own, source = getattr(recipe.run, key), recipe.origins[f"run.{key}"]
        if own == value:
            continue
        if source == SCHEMA:
            adopted[key] = value
            recipe.origins[f"run.{key}"] = f"{label(recipe.source)}: run.deepspeed_config.{name}"
        else:
            warn_once(f"run.{key} is {own} ({source}) but run.deepspeed_config.{name} says {value}: {own} is used.")
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, **adopted))


def validate(recipe: Recipe) -> None:
    """Raise ConfigError listing every combination of values in `recipe` that can't work."""
    messages = [message for rule in RULES for message in rule(recipe)]
    if messages:
        raise ConfigError(_listed(messages, label(recipe.source)))


def recipe_from_dict(values: Mapping[str, Any], source: Path = Path("saved config")) -> Recipe:
    """The Recipe that `to_dict` made. Keys that are missing take the schema's defaults, not those of the YAML files.

    Raises ConfigError if the values do not fit the schema; combinations are not checked again.
    """
    return _build([Layer(str(source), OmegaConf.create(dict(values)))], source)


def load_model_config(arch: str, model_type: str = "default", options: Sequence[str] = ()) -> ModelConfig:
    """The model section that `arch` and `model_type` (or the folder and file of a preset) mean by themselves; `options`
    are `key=value` within it.
    """
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
        raise ConfigError(_report(problems, layers, layers[0].label))
    model: Any = load_model_config(arch, model_type)
    if model.sees:
        config.vis_processor = processors(model.media, model.tower.image_size)
    return config


def processors(media: MediaConfig, image_size: int) -> ProcessorPair:
    """What is made of a picture's pixels, in training and otherwise."""
    size = {"image_size": image_size, "mean": media.mean, "std": media.std}
    size |= {"min_scale": media.min_scale, "max_scale": media.max_scale}
    train = ProcessorConfig(name=media.train_processor or media.processor, **size)
    return ProcessorPair(train, ProcessorConfig(name=media.processor, **size))


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
        raise ConfigError(_report(problems, layers, str(path or builder)))
    return entries


def model_types(arch: str) -> list[str]:
    """Names of the default YAML files of `arch`."""
    return sorted(p.stem for p in (CONFIGS_ROOT / "models" / arch).glob("*.yaml"))


def shipped_recipes() -> dict[str, Path]:
    """Short name (`shapes/align`) to file of every recipe in the package."""
    files = sorted(PROJECTS_ROOT.rglob("*.yaml"))
    return {p.relative_to(PROJECTS_ROOT).with_suffix("").as_posix(): p for p in files}


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means: itself if it exists, else the shipped recipe of that name.

    Raises ConfigError naming the nearest shipped recipes.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = shipped_recipes()
    name = file.as_posix().removeprefix("lavis/projects/").removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    hint = did_you_mean(name, shipped)
    raise ConfigError(f"no recipe {str(path)!r}, neither a file nor shipped.{hint} See `lavis configs list`.")


def _check_sections(layer: Layer) -> None:
    given = layer.values.keys() | ({"data"} if layer.values.get("datasets") else set())
    missing = [s for s in ("model", "data") if s not in given or layer.values.get(s, True) is None]
    if missing:
        raise ConfigError(f"{layer.label}: the recipe lacks the section {' and '.join(map(repr, missing))}.")


def _arch(layers: Sequence[Layer]) -> str:
    """The arch that the layers set, or the schema's. Raises ConfigError for an unknown one."""
    arch = str(_model(layers).get("arch", ModelConfig.arch))
    try:
        MODEL_CONFIGS.get(arch)
    except RegistryError as e:
        raise ConfigError(f"model.arch ({where('model.arch', layers)}): {e}") from e
    return arch


def _model(layers: Sequence[Layer]) -> Mapping[str, Any]:
    model = merged(layers).get("model") or {}
    if not isinstance(model, Mapping):
        raise ConfigError(f"model: {model!r} is not a mapping ({layers[0].label}).")
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
        folders = sorted(p.name for p in (CONFIGS_ROOT / "models").iterdir() if p.is_dir())
        raise ConfigError(
            f"{start}unknown model {folder or preset!r}.{did_you_mean(folder or preset, folders)} Known: {', '.join(folders)}."
        )
    raise ConfigError(f"{start}{folder} has no type {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _schema_layer(layers: Sequence[Layer]) -> Layer:
    """The defaults of every key that a recipe of these layers can have."""
    arch, model = _arch(layers), _model(layers)
    values = {
        "model": {**defaults(MODEL_CONFIGS.get(arch), model), "arch": arch},
        "init": [],
        "data": defaults(DataConfig, {}),
        "run": defaults(RunConfig, {}),
    }
    return Layer(SCHEMA, OmegaConf.create(values))


def _build(written: Sequence[Layer], source: Path) -> Recipe:
    """Translate, merge, resolve interpolations, check against the schema."""
    layers, problems = translated(written)
    for layer in layers:
        layer.values.pop("preprocess", None)
    layers = _with_defaults(layers)
    values = resolved(layers, source)
    problems += [Problem(str(k), "unknown section", SECTIONS) for k in values if k not in SECTIONS]
    model = read_dataclass(MODEL_CONFIGS.get(values["model"]["arch"]), values["model"], "model", problems)
    data = read_dataclass(DataConfig, values["data"], "data", problems)
    run = read_dataclass(RunConfig, values["run"], "run", problems)
    if problems:
        raise ConfigError(_report(problems, layers, label(source)))
    recipe = Recipe(model, data, run, source, {}, init=values["init"] or [])
    recipe.origins.update({key: origin(key, layers).label for key in recipe.flat()})
    return recipe


def _with_defaults(layers: Sequence[Layer]) -> list[Layer]:
    """The layers above the schema's, less what they say about parts that another one above them takes the place of."""
    chosen = dict(choices(MODEL_CONFIGS.get(_arch(layers)), "model"))
    for key, name in chosen.items():
        layers = _without_replaced(layers, key, name)
    schema = _schema_layer(layers)
    return [schema, *(_without_empty_sections(layer, schema, chosen) for layer in layers)]


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
    plain.get(section, {}).pop(name, None)
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


def _report(problems: Sequence[Problem], layers: Sequence[Layer], source: str) -> str:
    return _listed([_described(problem, layers) for problem in problems], source)


def _described(problem: Problem, layers: Sequence[Layer]) -> str:
    key, at = place(problem.key, layers)
    renamed = f" ({key} is called {problem.key} now.)" if key != problem.key else ""
    return f"{key} ({at}): {problem.message}.{_nearest(problem, layers)}{renamed}"


def _listed(messages: Sequence[str], source: str) -> str:
    if len(messages) == 1:
        return messages[0]
    return f"{source}: {len(messages)} problems\n" + "\n".join(f"  - {message}" for message in messages)


def _nearest(problem: Problem, layers: Sequence[Layer]) -> str:
    """Valid names near an unknown one: the same name in another section, else near names beside it, else elsewhere."""
    if problem.siblings is None:
        return ""
    name = problem.key.rsplit(".", 1)[-1]
    elsewhere = [key for key, _ in leaves(layers[0].plain)]
    same = [key for key in elsewhere if key.rsplit(".", 1)[-1] == name]
    if same and name not in problem.siblings:
        return f" It belongs elsewhere: {' or '.join(same[:3])}."
    beside = did_you_mean(name, problem.siblings)
    if beside:
        return beside
    by_name = {key.rsplit(".", 1)[-1]: key for key in reversed(elsewhere)}
    return did_you_mean(name, by_name) or f" Known here: {', '.join(problem.siblings)}."


def _warn_unused(recipe: Recipe) -> None:
    for key, field, value in [*iter_fields(recipe.run, "run"), *iter_fields(recipe.model, "model")]:
        why = field.metadata["unused"]
        if why and value is not None and recipe.origins[key] != SCHEMA:
            warn_once(f"{key} ({recipe.origins[key]}) has no effect any more: {why}.")
