"""Recipes: one YAML file names model, data and run. Here it is merged with the defaults, checked and typed.

Later layers win: schema < lavis/configs/models/<arch>/<model_type>.yaml < lavis/configs/datasets/<builder>.yaml <
recipe < --options.
Nothing here imports torch: a wrong recipe is told in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis.config.deepspeed import DEEPSPEED_RUNNERS, shared_values
from lavis.config.files import missing_files
from lavis.config.rules import RULES
from lavis.config.schema import DatasetConfig, ModelConfig, PreprocessConfig, RunConfig
from lavis.config.typed import Problem, iter_fields, join, read_dataclass
from lavis.core.errors import ConfigError, RegistryError, did_you_mean
from lavis.core.logging import warn_once
from lavis.core.paths import CONFIGS_ROOT, PACKAGE_ROOT, PROJECTS_ROOT
from lavis.core.registries import DATASETS
from lavis.models.configs import MODEL_CONFIGS

__all__ = ["Recipe", "find_recipe", "load_dataset_config", "load_model_config", "load_preprocess_config", "load_recipe"]
__all__ += ["missing_files", "model_types", "recipe_from_dict", "shipped_recipes", "validate"]

SCHEMA, OPTIONS = "schema", "--options"
SECTIONS = ("model", "datasets", "run")


@dataclass(frozen=True)
class Layer:
    """One source of values. `label` names it in messages and origins; `path` is None for the schema and the options."""

    label: str
    values: DictConfig
    path: Path | None = None

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """The values as dicts and lists, interpolations not filled in."""
        return cast(dict[str, Any], OmegaConf.to_container(self.values))


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe. `origins` says for each dotted key where its value comes from."""

    model: ModelConfig
    datasets: dict[str, DatasetConfig]
    run: RunConfig
    source: Path
    origins: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values; `recipe_from_dict` reads them back."""
        return {
            "model": dataclasses.asdict(self.model),
            "datasets": {name: dataclasses.asdict(config) for name, config in self.datasets.items()},
            "run": dataclasses.asdict(self.run),
        }

    def to_yaml(self) -> str:
        """The sections as YAML, in the schema's order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Dotted key to value; lists and empty mappings count as values."""
        return dict(_leaves(self.to_dict()))


def load_recipe(path: str | Path, options: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` (a file, or a shipped one's name such as `shapes/align`) with `a.b=value` overrides.

    Raises ConfigError listing every unknown key and wrong value, or else every impossible combination, with the mend.
    """
    file = find_recipe(path)
    user = [_read_layer(file), _options_layer(options)]
    _check_sections(user[0])
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
        own, origin = getattr(recipe.run, key), recipe.origins[f"run.{key}"]
        if own == value:
            continue
        if origin == SCHEMA:
            adopted[key] = value
            recipe.origins[f"run.{key}"] = f"{label(recipe.source)}: run.deepspeed_config.{name}"
        else:
            warn_once(f"run.{key} is {own} ({origin}) but run.deepspeed_config.{name} says {value}: {own} is used.")
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
    layer = Layer(str(source), OmegaConf.create(dict(values)))
    return _build([_schema_layer(_arch([layer])[0], list(layer.values.get("datasets") or {})), layer], source)


def load_model_config(arch: str, model_type: str = "default", options: Sequence[str] = ()) -> ModelConfig:
    """The model section that `arch` and `model_type` mean by themselves; `options` are `key=value` within it."""
    chosen = Layer(SCHEMA, OmegaConf.create({"model": {"arch": arch, "model_type": model_type}}))
    layers = [chosen, _options_layer([f"model.{o}" for o in options])]
    return _build([*_default_layers(layers), *layers], Path(arch)).model


def load_preprocess_config(arch: str, model_type: str = "default") -> PreprocessConfig:
    """The processors in the default YAML of a model; the schema's where that has no `preprocess` section."""
    path = _model_yaml(arch, model_type)
    if path is None:
        return PreprocessConfig()
    layer, problems = _read_layer(path), list[Problem]()
    config = read_dataclass(PreprocessConfig, _resolved([layer], path).get("preprocess"), "preprocess", problems)
    if problems:
        raise ConfigError(_report(problems, [layer], layer.label))
    return config


def load_dataset_config(builder: str, path: str | Path | None = None) -> DatasetConfig:
    """The section `datasets.<builder>` of its default YAML, overridden by the file at `path` if one is given."""
    user = [Layer(SCHEMA, OmegaConf.create({"datasets": {builder: {}}}))]
    if path is not None:
        user.append(_read_layer(Path(path)))
    return _build([*_default_layers(user), *user], Path(path or builder)).datasets[builder]


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


def _read_layer(path: Path) -> Layer:
    try:
        values = OmegaConf.load(path)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise ConfigError(f"{label(path)}:{mark.line + 1}: not valid YAML: {e.problem or e.context}.") from e
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as e:
        raise ConfigError(f"{label(path)}: can't be read as YAML: {e}") from e
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{label(path)}: a recipe is a mapping with the sections {', '.join(SECTIONS)}.")
    return Layer(label(path), values, path)


def _options_layer(options: Sequence[str]) -> Layer:
    values = OmegaConf.create()
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"option {option!r} is not of the form key.sub=value.")
        try:
            values.merge_with_dotlist([option])
        except (yaml.YAMLError, OmegaConfBaseException, TypeError) as e:
            reason = str(e).splitlines()[0]
            raise ConfigError(f"option {option!r} can't be read: {reason}. Quote what is not plain YAML.") from e
    return Layer(OPTIONS, values)


def _check_sections(layer: Layer) -> None:
    missing = [s for s in ("model", "datasets") if not layer.values.get(s)]
    if missing:
        raise ConfigError(f"{layer.label}: the recipe lacks the section {' and '.join(map(repr, missing))}.")


def _arch(layers: Sequence[Layer]) -> tuple[str, str]:
    """(arch, model_type) as the layers set them, or the schema's. Raises ConfigError for an unknown arch."""
    merged = cast(DictConfig, OmegaConf.merge(*(layer.values for layer in layers)))
    model = merged.get("model") or {}
    if not isinstance(model, Mapping):
        raise ConfigError(f"model: {model!r} is not a mapping ({layers[0].label}).")
    arch, model_type = (str(model.get(k, getattr(ModelConfig, k))) for k in ("arch", "model_type"))
    try:
        MODEL_CONFIGS.get(arch)
    except RegistryError as e:
        raise ConfigError(f"model.arch ({_where('model.arch', layers)}): {e}") from e
    return arch, model_type


def _default_layers(user: Sequence[Layer]) -> list[Layer]:
    """The layers below the user's: schema, the model's YAML, the datasets' YAML."""
    arch, model_type = _arch(user)
    merged = cast(DictConfig, OmegaConf.merge(*(layer.values for layer in user)))
    datasets = merged.get("datasets") or {}
    if not isinstance(datasets, Mapping):
        raise ConfigError(f"datasets: {datasets!r} is not a mapping of dataset names ({_where('datasets', user)}).")
    names = list(map(str, datasets))
    path = _model_yaml(arch, model_type, _where("model.model_type", user))
    files = ([path] if path else []) + [p for n in names if (p := CONFIGS_ROOT / "datasets" / f"{n}.yaml").exists()]
    layers = [_read_layer(p) for p in files]
    for layer in layers:
        layer.values.pop("preprocess", None)
    return [_schema_layer(arch, names), *layers]


def _model_yaml(arch: str, model_type: str, where: str = "") -> Path | None:
    """The default YAML of a model type; None for the type `default` of an arch that has none."""
    path = CONFIGS_ROOT / "models" / arch / f"{model_type}.yaml"
    if path.exists():
        return path
    if model_type == ModelConfig.model_type:
        return None
    known = model_types(arch)
    place, hint = f" ({where})" if where else "", did_you_mean(model_type, known)
    raise ConfigError(f"model.model_type{place}: {arch} has no type {model_type!r}.{hint} Known: {', '.join(known)}.")


def _schema_layer(arch: str, datasets: Sequence[str]) -> Layer:
    values = {
        "model": dataclasses.asdict(MODEL_CONFIGS.get(arch)(arch=arch)),
        "datasets": {name: dataclasses.asdict(DatasetConfig()) for name in datasets},
        "run": dataclasses.asdict(RunConfig()),
    }
    return Layer(SCHEMA, OmegaConf.create(values))


def _build(layers: Sequence[Layer], source: Path) -> Recipe:
    """Merge, resolve interpolations, check against the schema."""
    layers = [layers[0], *(_without_empty_sections(layer, layers[0]) for layer in layers[1:])]
    values = _resolved(layers, source)
    problems = [Problem(str(k), "unknown section", SECTIONS) for k in values if k not in SECTIONS]
    arch = values["model"]["arch"]
    model = read_dataclass(MODEL_CONFIGS.get(arch), values["model"], "model", problems)
    datasets = {}
    for name, section in (values["datasets"] or {}).items():
        datasets[str(name)] = read_dataclass(DatasetConfig, section, join("datasets", name), problems)
        if name not in DATASETS:
            problems.append(Problem(join("datasets", name), "unknown dataset", tuple(DATASETS.list())))
    run = read_dataclass(RunConfig, values["run"], "run", problems)
    if problems:
        raise ConfigError(_report(problems, layers, label(source)))
    recipe = Recipe(model, datasets, run, source, {})
    recipe.origins.update({key: _origin(key, layers).label for key in recipe.flat()})
    return recipe


def _without_empty_sections(layer: Layer, schema: Layer) -> Layer:
    """The layer less its sections that are null (`vis_processor:` with nothing below): they would hide the defaults."""

    def strip(values: Mapping[Any, Any], below: Mapping[str, Any]) -> dict[Any, Any]:
        sections = {name for name, value in below.items() if isinstance(value, Mapping) and value}
        kept = {name: value for name, value in values.items() if value is not None or name not in sections}
        inner = {n: strip(v, below[n]) for n, v in kept.items() if n in sections and isinstance(v, Mapping)}
        return kept | inner

    return dataclasses.replace(layer, values=OmegaConf.create(strip(layer.plain, schema.plain)))


def _resolved(layers: Sequence[Layer], source: Path) -> dict[str, Any]:
    """The merged layers as plain values, interpolations filled in."""
    try:
        merged = OmegaConf.merge(*(layer.values for layer in layers))
        return cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as e:
        raise ConfigError(f"{label(source)}: {e.full_key or 'a value'}: {str(e).splitlines()[0]}.") from e


def _report(problems: Sequence[Problem], layers: Sequence[Layer], source: str) -> str:
    return _listed([f"{p.key} ({_where(p.key, layers)}): {p.message}.{_nearest(p, layers)}" for p in problems], source)


def _listed(messages: Sequence[str], source: str) -> str:
    if len(messages) == 1:
        return messages[0]
    return f"{source}: {len(messages)} problems\n" + "\n".join(f"  - {message}" for message in messages)


def _nearest(problem: Problem, layers: Sequence[Layer]) -> str:
    """Valid names near an unknown one: the same name in another section, else near names beside it, else elsewhere."""
    if problem.siblings is None:
        return ""
    name = problem.key.rsplit(".", 1)[-1]
    elsewhere = [key for key, _ in _leaves(layers[0].plain)]
    same = [key for key in elsewhere if key.rsplit(".", 1)[-1] == name]
    if same and name not in problem.siblings:
        return f" It belongs elsewhere: {' or '.join(same[:3])}."
    beside = did_you_mean(name, problem.siblings)
    if beside:
        return beside
    by_name = {key.rsplit(".", 1)[-1]: key for key in reversed(elsewhere)}
    return did_you_mean(name, by_name) or f" Known here: {', '.join(problem.siblings)}."


def _origin(key: str, layers: Sequence[Layer]) -> Layer:
    """The last layer that sets `key`, or sets a section around it to a plain value such as null."""
    for layer in reversed(layers[1:]):
        node: Any = layer.plain
        for part in key.split("."):
            if not isinstance(node, Mapping):
                return layer
            if part not in node:
                break
            node = node[part]
        else:
            return layer
    return layers[0]


def _where(key: str, layers: Sequence[Layer]) -> str:
    """Label of the layer that sets `key`, with the line if it is a file."""
    layer = _origin(key, [Layer(SCHEMA, OmegaConf.create()), *layers])
    if layer.path is None:
        return layer.label
    node, line = yaml.compose(layer.path.read_text(encoding="utf-8")), 0
    for part in key.split("."):
        pairs = {k.value: (k, v) for k, v in node.value} if isinstance(node, yaml.MappingNode) else {}
        if part not in pairs:
            break
        line, node = pairs[part][0].start_mark.line + 1, pairs[part][1]
    return f"{layer.label}:{line}"


def _warn_unused(recipe: Recipe) -> None:
    for key, field, value in [*iter_fields(recipe.run, "run"), *iter_fields(recipe.model, "model")]:
        why = field.metadata["unused"]
        if why and value is not None and recipe.origins[key] != SCHEMA:
            warn_once(f"{key} ({recipe.origins[key]}) has no effect any more: {why}.")


def label(path: Path) -> str:
    """A path as messages show it: files of the package as lavis/..., others as given."""
    absolute = path.absolute()
    return absolute.relative_to(PACKAGE_ROOT.parent).as_posix() if absolute.is_relative_to(PACKAGE_ROOT) else str(path)


def _leaves(values: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, join(key, name))
        else:
            yield join(key, name), value
