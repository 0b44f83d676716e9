"""Teach a chat LLM to see. `import lavis` imports no torch: what is heavy is loaded at first use.

import lavis
print(lavis.model_zoo)
model, vis_processors, txt_processors = lavis.load_model_and_preprocess("minigpt4qwen", "qwen7b_chat", is_eval=True)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(
        ["dataset_zoo", "load_dataset", "load_model", "load_model_and_preprocess", "load_preprocess", "model_zoo"],
        "lavis.zoo",
    ),
    "load_recipe": "lavis.config.recipe",
}
_LAZY_MODULES = {"registries": "lavis.core.registries"}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(_LAZY_MODULES[name])
    if name not in _LAZY:
        raise AttributeError(f"module 'lavis' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_LAZY_MODULES])
