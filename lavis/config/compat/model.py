"""Older spellings of the `model` part of a recipe: one flat section for each architecture, before there were parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis.config.compat import Wrong

RENAMES: dict[str, str] = {
    "model.vit_model": "model.tower.name",
    "model.image_size": "model.tower.image_size",
    "model.drop_path_rate": "model.tower.drop_path_rate",
    "model.use_grad_checkpoint": "model.tower.recompute",
    "model.vit_precision": "model.tower.precision",
    "model.unfreeze_pos_embed": "model.tower.train_positions",
    "model.num_query_token": "model.connector.num_query_token",
    "model.qformer": "model.connector.qformer",
    "model.llm_model": "model.llm.weights",
    "model.llm_config": "model.llm.config",
    "model.llm_device_map": "model.llm.device_map",
    "model.llm_quantization": "model.llm.quantization",
    "model.llm_grad_checkpoint": "model.llm.recompute",
    "model.max_txt_len": "model.max_length",
    "model.finetuned": "model.released",
}
"""Old dotted key to new one, value unchanged."""
_SWITCHES = (
    "freeze_vit", "freeze_qformer", "freeze_queries", "freeze_llm", "freeze_proj",
    "get_lora", "lora_parts", "lora_r", "lora_alpha", "lora_dropout",
    "load_pretrained", "vit_pretrained", "pretrained", "load_finetuned",
    "model_type", "vit", "tokenizer", "qformer_text_input",
)  # fmt: skip
CONSUMED: tuple[str, ...] = tuple(f"model.{key}" for key in _SWITCHES)
"""Old dotted keys that `rules` reads; they are removed afterwards."""
FROZEN = {
    "llm_model": "llm.weights",
    "tokenizer": "llm.tokenizer",
    "pretrained": "connector.weights",
    "vit_pretrained": "tower.weights",
}
"""Old names of frozen weights in checkpoints to those of today."""
ORIGINAL = "minigpt4qwen"
"""Folder of presets that a `model_type` of the original's commands is in."""
ARCHS = (ORIGINAL, "causal_lm", "blip2_qformer", "byte_level_bpe")
"""Architectures that had default files without being asked."""
_PARTS = {"vit": "tower.train", "qformer": "connector.train_qformer", "llm": "llm.train"}
"""Old names of the parts that could be adapted to what says how they are trained."""

Plain = Mapping[str, Any]


def rules(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[str, ...]] | Wrong]:
    """(new key, value, old keys it follows from) of what more than one old key says, from the merged layers."""
    model = values.get("model")
    if not isinstance(model, Mapping):
        return
    yield from _architecture(model)
    yield from _weights(model)
    yield from _start(values, model)
    yield from _training(model)
    yield from _adapters(model)
    yield from _media(values)
    for name, value in _mapping(model.get("vit")).items():
        if value is not None:
            yield f"model.tower.{name}", value, (f"model.vit.{name}",)
    if "tokenizer" in model:
        key = "text_tokenizer" if model.get("arch") == "blip2_qformer" else "llm.tokenizer"
        yield f"model.{key}", model["tokenizer"], ("model.tokenizer",)


def _architecture(model: Plain) -> Iterator[Any]:
    arch, sources = model.get("arch"), _there(model, "arch", "model_type")
    if arch is None and "preset" not in model and not any(name in model for name in ("tower", "llm")):
        # what a recipe without an arch was
        old = [key for key in (*_SWITCHES, "llm_model", "vit_model", "image_size") if key in model]
        arch, sources = ("minigpt4qwen", sources or (f"model.{old[0]}",)) if old else (None, ())
    folder = arch if arch in ARCHS or (arch and "model_type" in model) else None
    if arch in (None, "vlm") and "model_type" in model:
        folder = str(model.get("preset") or "minigpt4qwen/").rpartition("/")[0]
    if folder and ("model_type" in model or "preset" not in model):
        yield "model.preset", f"{folder}/{model.get('model_type', 'default')}", sources
    sources = sources[:1]
    if arch == "minigpt4qwen":
        yield "model.tower.name", model.get("vit_model", "eva_clip_g"), sources
        yield "model.connector.name", "qformer_linear", sources
    if arch == "causal_lm":
        yield "model.llm.train", "full", sources
    if arch in ("minigpt4qwen", "causal_lm"):
        yield "model.arch", "vlm", sources


def _weights(model: Plain) -> Iterator[Any]:
    """One file could hold tower and Q-Former; `vit_pretrained` named another one for the tower."""
    if sources := _there(model, "load_pretrained", "vit_pretrained", "pretrained"):
        both, own = (_inside(model, part, "weights") for part in ("connector", "tower"))
        pretrained = model.get("pretrained", both)
        vit = model.get("vit_pretrained", own if own != both else None)
        wanted = model.get("load_pretrained", True)
        yield "model.tower.weights", (vit or pretrained) if wanted else None, sources
        yield "model.connector.weights", pretrained if wanted else None, sources


def _start(values: Plain, model: Plain) -> Iterator[Any]:
    if model.get("load_finetuned") and (file := model.get("finetuned", model.get("released"))):
        yield "init", [{"from": file}], _there(model, "load_finetuned", "finetuned")
    elif model.get("load_finetuned") is False and values.get("init"):  # an older option over a recipe of today
        yield "init", [], ("model.load_finetuned",)


def _training(model: Plain) -> Iterator[Any]:
    from lavis.config.compat import Wrong

    lora = bool(model.get("get_lora"))
    adapted = model.get("lora_parts", ["llm"]) if lora else []
    if lora and not adapted:
        yield Wrong("model.lora_parts", "model.get_lora needs a part to adapt: name llm, vit or qformer")
    for old, new in _PARTS.items():
        frozen = model.get(f"freeze_{old}")
        if old not in adapted:
            if frozen is not None:
                yield f"model.{new}", "frozen" if frozen else "full", (f"model.freeze_{old}",)
            continue
        if frozen is False:
            yield Wrong(
                f"model.freeze_{old}",
                f"model.get_lora adapts a frozen {old}, but model.freeze_{old} is false: choose one of the two",
            )
        yield f"model.{new}", "lora", _there(model, "get_lora", "lora_parts", f"freeze_{old}")
    if "freeze_queries" in model:
        yield "model.connector.train_queries", not model["freeze_queries"], ("model.freeze_queries",)
    if "freeze_proj" in model:
        yield "model.connector.train", "frozen" if model["freeze_proj"] else "full", ("model.freeze_proj",)
    if model.get("qformer_text_input"):
        yield Wrong("model.qformer_text_input", "the Q-Former is not given the question here: set it to false")


def _adapters(model: Plain) -> Iterator[Any]:
    parts = [_PARTS[part].partition(".")[0] for part in model.get("lora_parts") or ["llm"] if part in _PARTS]
    for old, new in (("lora_r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        if old in model:
            for part in parts:
                yield f"model.{part}.lora.{new}", model[old], (f"model.{old}",)


def _media(values: Plain) -> Iterator[Any]:
    """The processors of the first data set with images were the model's."""
    for name, data in _mapping(values.get("datasets")).items():
        processors = _mapping(_mapping(data).get("vis_processor"))
        if not processors or data.get("data_type") == "text":
            continue
        train, judged = (_mapping(processors.get(kind)) for kind in ("train", "eval"))
        key = f"datasets.{name}.vis_processor"
        for own, theirs in (("processor", "name"), ("mean", "mean"), ("std", "std")):
            if judged.get(theirs) is not None:
                yield f"model.media.{own}", judged[theirs], (f"{key}.eval.{theirs}",)
        if train.get("name") not in (None, judged.get("name")):
            yield "model.media.train_processor", train["name"], (f"{key}.train.name",)
            for bound in ("min_scale", "max_scale"):
                if bound in train:
                    yield f"model.media.{bound}", train[bound], (f"{key}.train.{bound}",)
        return


def _mapping(value: Any) -> Plain:
    """`value`, or nothing where it is no mapping, which is reported elsewhere."""
    return value if isinstance(value, Mapping) else {}


def _there(model: Plain, *names: str) -> tuple[str, ...]:
    return tuple(f"model.{name}" for name in names if name in model)


def _inside(model: Plain, section: str, name: str) -> Any:
    return _mapping(model.get(section)).get(name)
