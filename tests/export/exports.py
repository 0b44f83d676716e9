"""Runs to export: small random models in which no tensor is trivial, and the shipped shapes models."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lavis.config.recipe import load_recipe, recipe_from_dict
from lavis.core.paths import ASSETS_ROOT
from lavis.data.assemble import load_tokenizer
from lavis.data.loader import collate
from lavis.models.vlm import Vlm
from lavis.runs.checkpoint import TrainState, identity, save_checkpoint
from lavis.tokens.template import image_token_id
from lavis.weights.tensors import read_tensors, write_tensors

SHAPES = ASSETS_ROOT / "shapes"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
FAMILIES = {
    "llama": lambda vocab: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=True, **SIZES, **IDS)),
    "qwen2": lambda vocab: Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, **SIZES, **IDS)),
    "qwen3": lambda vocab: Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, head_dim=16, **SIZES, **IDS)),
}
MODEL = {
    "arch": "minigpt4qwen",
    "image_size": 32,
    "vit": {"patch_size": 8, "embed_dim": 40, "depth": 3, "num_heads": 4, "mlp_ratio": 2.3},
    "num_query_token": 5,
    "qformer": {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 56},
}
PROCESSOR = {"name": "blip2_image_eval", "image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def randomize(module, scale=0.1):
    """Give every tensor non-trivial values (norm weights, biases and zero-initialised parts too)."""
    for p in module.parameters():
        p.data += scale * torch.randn_like(p)
    return module


def random_run(
    folder: Path, family: str = "qwen2", *, placeholder: bool = True, quiet: bool = False, **changes
) -> Path:
    """A run folder whose one checkpoint holds random values for all that the `model` section, with `changes`, trains.

    Without `placeholder` the LLM's tokenizer has no token for images and its embedding no row to spare. In a `quiet`
    tower tokens
    have so small a variance that every eps counts; otherwise it is about that of trained ones (26 to 50 in the shapes
    world).
    """
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(SHAPES / "llm_a")
    llm = randomize(FAMILIES[family](len(tokenizer) + 9 * placeholder))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    if not placeholder:
        for file in (folder / "llm").glob("tokenizer*.json"):
            file.write_text(file.read_text(encoding="utf-8").replace("<|extra_0|>", "<|other|>"), encoding="utf-8")
    section = MODEL | {"llm_model": str(folder / "llm"), "pretrained": str(folder / "tower.safetensors")} | changes
    datasets = {"shapes_instruction": {"vis_processor": {"train": PROCESSOR, "eval": PROCESSOR}}}
    recipe = recipe_from_dict({"model": section, "datasets": datasets, "run": {"task": "image_text_pretrain"}})
    model = Vlm(recipe.model, llm, image_token_id(load_tokenizer(recipe.model)))
    model.add_adapters()
    randomize(model)
    with torch.no_grad():
        model.visual_encoder.model.pos_embed *= 40
        model.connector.query_tokens *= 20
        for name, p in model.visual_encoder.named_parameters() if quiet else ():
            p *= 1e-2 if not name.endswith(("norm1.weight", "norm2.weight")) else 1
        model.connector.query_tokens *= 1e-6 if quiet else 1
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("llm_")}
    write_tensors(
        {k.replace(".base_layer.", "."): v for k, v in own.items() if ".lora_" not in k},
        folder / "tower.safetensors",
        torch.float32,
    )
    return save_run(folder, recipe, {n: p for n, p in model.named_parameters() if p.requires_grad})


def shapes_run(folder: Path) -> Path:
    """A run folder of the shipped tower with the LLM and the projection it was trained with."""
    recipe = load_recipe("shapes/evaluate_tower", ["model.load_finetuned=false", "model.finetuned=null"])
    tower = read_tensors("shapes/tower/tower.safetensors")
    return save_run(folder, recipe, {k: v.float() for k, v in tower.items() if k.startswith("llm_proj.")})


def save_run(folder: Path, recipe, tensors, step: int = 7, valid_loss: float | None = 0.5) -> Path:
    """Write a checkpoint of `tensors` to the run folder `folder`/run."""
    from lavis.core.paths import resolve

    frozen = {file.key.removeprefix("model."): identity(resolve(file.name)) for file in recipe.model.files()}
    save_checkpoint(
        folder / "run" / "checkpoints",
        TrainState(step, 8, frozen=frozen, valid_loss=valid_loss),
        dict(tensors),
        {},
        recipe.to_yaml(),
    )
    return folder / "run"


def picture(file: Path, size=(90, 61), mode="RGB", seed=0) -> Path:
    """A picture file with large and small structure."""
    torch.manual_seed(seed)
    coarse = torch.randint(0, 256, (5, 7, len(mode)), dtype=torch.uint8).squeeze(-1).numpy()
    image = Image.fromarray(coarse, mode).resize(size, Image.Resampling.BICUBIC)
    image.save(file)
    return file


def batch_of(samples, processor, files, pad_token_id):
    """A padded batch; `files` are the pictures of all samples in reading order."""
    images = {"pixel_values": torch.stack([processor(Image.open(file)) for file in files])} if files else {}
    return collate([[s] for s in samples], images, pad_token_id, None)


def conversation(messages):
    """Messages in transformers' form, read as this program reads OpenAI's, without an answer."""
    from lavis.data.dialects import to_conversation

    return to_conversation({"messages": [*messages, {"role": "assistant", "content": "."}]}, "messages", where="test")


def distance(a, b):
    """Norm of the difference relative to the norm of `b`."""
    return float(((a - b).double().norm() / b.double().norm()).detach())
