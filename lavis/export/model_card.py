"""README.md of an export: what it is, how to ask it, how well it answers, and the recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lavis
from lavis.config.schema import DataEntry
from lavis.export.trained import Trained
from lavis.runs.folder import SUMMARY

SNIPPET = """\
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)  # or torch.bfloat16, device_map="auto"
model.vision_model.post_layernorm.eps = 1e-5  # as in training; transformers has the blocks' 1e-6 here
processor = AutoProcessor.from_pretrained(folder, backend="pil")

question = {"type": "text", "text": "What is in the picture?"}
messages = [{"role": "user", "content": [{"type": "image", "path": "picture.jpg"}, question]}]
inputs = processor.apply_chat_template(
    messages,
    chat_template=processor.tokenizer.chat_template,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    sanitize_control_tokens=True,  # what a user types never becomes a control token
    processor_kwargs={"add_special_tokens": False},
).to(model.device)
model.generation_config.do_sample = False
ids = model.generate(**inputs, generation_config=model.generation_config)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
"""
"""Asks a stock model as this program asks its own."""

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [{tags}]
---

# {name}

{parts} and the chat LLM `{llm}`, trained with lavis {version} and exported to transformers' `{stock}`. Nothing of lavis
is needed to use it.

## Asking it

```python
{snippet}```

Several images may stand anywhere in a user turn, and turns may follow each other.
{alone}`backend="pil"` makes pictures exactly those of the training; the default one differs by rounding. {prompts}

## Results

{results}

## Data

{data}

## Recipe

```yaml
{recipe}```
"""


@dataclass(frozen=True)
class About:
    """What a card says of a class of transformers. alone: how the LLM is asked without an image, if otherwise."""

    stock: str
    tags: str
    parts: str
    alone: str = ""


BLIP2 = About(
    "Blip2ForConditionalGeneration",
    "blip-2, minigpt4qwen",
    "A vision tower (EVA ViT and Q-Former of BLIP-2), a linear layer",
    "Without any image, ask the LLM alone: the same call gives `inputs`, and `model.language_model.generate` takes"
    " them.\n",
)
LLAVA = About("LlavaForConditionalGeneration", "llava", "A vision tower, an MLP of two layers")


def model_card(trained: Trained, differences: Sequence[str], about: About = BLIP2) -> str:
    """The card of `trained`; `differences` are prompts that transformers encodes otherwise."""
    return _CARD.format(
        **asdict(about),
        name=f"{trained.run_folder.parent.name}, {trained.checkpoint.path.name}",
        llm=trained.model.llm.weights,
        version=lavis.__version__,
        snippet=SNIPPET,
        prompts=_prompts(differences),
        results=_results(trained),
        data="\n".join(
            f"- `{entry.name or entry.source}`{_files(entry)}" for _, entry in trained.recipe.data.entries()
        ),
        recipe=trained.recipe.to_yaml(),
    )


def _prompts(differences: Sequence[str]) -> str:
    if not differences:
        return "The prompt's tokens equal those of the training; this was checked when the folder was written."
    return "**The prompt's tokens differ from those of the training:**\n\n" + "\n".join(
        f"- {line}" for line in differences
    )


def _results(trained: Trained) -> str:
    """What the run measured: its summary if it has ended, else its newest training loss."""
    checkpoint, summary = trained.checkpoint, trained.run_folder / SUMMARY
    values: dict[str, float] = {}
    if checkpoint.valid_loss is not None:
        values["validation loss"] = checkpoint.valid_loss
    about = f"The weights are those of step {checkpoint.step}."
    if summary.is_file():
        ended = json.loads(summary.read_text(encoding="utf-8"))
        values |= ended["results"]
        about += (
            f" Answers were judged before training (before/), and after step {ended['steps']} with (test/) and without"
            " (blind/) the pictures."
        )
    else:
        values |= _newest_loss(trained.run_folder / "metrics.jsonl")
    return "\n".join(
        [about, "", "| | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in values.items())]
    )


def _newest_loss(metrics: Path) -> dict[str, float]:
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    return {
        f"training loss at step {row['step']}": row["loss"] for row in [r for r in rows if r["kind"] == "train"][-1:]
    }


def _files(entry: DataEntry) -> str:
    files = ", ".join(f"`{path}`" for path, _, _ in entry.files())
    return f": {entry.split or entry.kind} {files}" if files else ""
