"""DeepSpeed checkpoints of the original program as the weight files that its demos, and ours, read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lavis.core.errors import CheckpointError
from lavis.weights.tensors import reading

MODEL_STATES = "mp_rank_00_model_states.pt"
ZERO3_STATES, ZERO3_WEIGHTS = "zero_pp_rank_*_mp_rank_00_model_states.pt", "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL_FILE, LLM_FILE = "model.pth", "unfreeze_llm_model.pth"
TRAINER_PACKAGES = ("argparse", "deepspeed", "numpy", "omegaconf")
"""Where the objects come from that a trainer saves beside the weights (arguments, loss scaler, counters); they are not
rebuilt.
"""
PROJECTION = {"visionpipe.llm_proj.weight": "llm_proj.weight", "visionpipe.llm_proj.bias": "llm_proj.bias"}
LLM_PARTS = {
    "ln_1.weight": ("transformer.wte.weight", "transformer.h", "transformer.ln_f.weight"),
    "input_layernorm.weight": ("model.embed_tokens.weight", "model.layers", "model.norm.weight"),
}
"""A tensor that tells one generation of Qwen's blocks from the other, to its names of embedding, blocks and final norm.
"""

Tensors = dict[str, torch.Tensor]


def deepspeed2pth(ckpt_dir: Path) -> Path:
    """Write the model of a ZeRO checkpoint to `ckpt_dir`/model.pth, a bare dict of tensors under their own names.

    Of ZeRO-3, where every tensor is in pieces, what was trained is put together, in fp32. Raises CheckpointError for a
    missing, damaged
    or unsafe file, and for pipeline checkpoints.
    """
    if pieces := sorted(ckpt_dir.glob(ZERO3_STATES), key=_rank):
        return _save(_put_together(ckpt_dir, pieces), ckpt_dir / MODEL_FILE)
    file = ckpt_dir / MODEL_STATES
    if not file.is_file():
        raise CheckpointError(f"{ckpt_dir} has no {MODEL_STATES}. {_what_it_is(ckpt_dir)}")
    if (ckpt_dir / MODEL_STATES.replace("00", "01")).exists():
        raise CheckpointError(
            f"{ckpt_dir} was split over several ranks by tensor parallelism, which can't be converted here."
        )
    states = read_states(file)
    model = states.get("module") if isinstance(states, dict) else None
    if not _holds_tensors(model):
        raise CheckpointError(f"{file} has no tensors under 'module'. {_what_it_is(ckpt_dir)}")
    return _save(model, ckpt_dir / MODEL_FILE)


def pipe_proj2pth(ckpt_dir: Path) -> Path:
    """Write the projection of a pipeline checkpoint to `ckpt_dir`/model.pth: llm_proj.weight and llm_proj.bias.

    Raises CheckpointError if there is no first layer, or no projection in it.
    """
    files = _layer_files(ckpt_dir)
    if 0 not in files:
        raise CheckpointError(
            f"{ckpt_dir} has no layer_00-model_states.pt: give the folder of one step, such as global_step296."
        )
    return _save(_projection(files[0], _read_layer(files[0])), ckpt_dir / MODEL_FILE)


def pipemodel2pth(ckpt_dir: Path) -> Path:
    """Write projection and language model of a pipeline checkpoint to `ckpt_dir`/unfreeze_llm_model.pth.

    The names are llm_proj.* and llm_model.* with the LLM's own behind it. Vision tower and Q-Former, which the original
    keeps
    frozen there, are left out. Raises CheckpointError if a layer is missing or holds something else.
    """
    layers = {index: (file, _read_layer(file)) for index, file in _layer_files(ckpt_dir).items()}
    if 0 not in layers:
        raise CheckpointError(
            f"{ckpt_dir} has no layer_00-model_states.pt: give the folder of one step, such as global_step296."
        )
    blocks = {
        index: tensors for index, (_, tensors) in layers.items() if any(name.startswith("layer.") for name in tensors)
    }
    _check_blocks(ckpt_dir, blocks)
    first = next(iter(blocks.values()))
    parts = next((names for mark, names in LLM_PARTS.items() if f"layer.{mark}" in first), None)
    if parts is None:
        raise CheckpointError(
            f"the blocks in {ckpt_dir} are not those of a Qwen: they hold {', '.join(sorted(first)[:4])}, ..."
        )
    embedding, block, norm = parts
    file, tensors = layers[0]
    model = _projection(file, tensors)
    ends = {
        "wtepipe.word_embeddings.weight": embedding,
        "final_layernorm.weight": norm,
        "lm_head.weight": "lm_head.weight",
    }
    found = {name: tensor for _, tensors in layers.values() for name, tensor in tensors.items() if name in ends}
    if absent := sorted(ends.keys() - found.keys()):
        raise CheckpointError(f"no layer in {ckpt_dir} holds {', '.join(absent)}: is a file missing?")
    model |= {f"llm_model.{ends[name]}": tensor for name, tensor in found.items()}
    for number, tensors in enumerate(blocks.values()):
        model |= {
            f"llm_model.{block}.{number}.{name.removeprefix('layer.')}": tensor for name, tensor in tensors.items()
        }
    return _save(model, ckpt_dir / LLM_FILE)


def read_states(file: Path) -> Any:
    """The content of a checkpoint file of DeepSpeed, its tensors mapped from the file; nothing in it runs.

    Objects of TRAINER_PACKAGES become inert stand-ins. Raises CheckpointError naming any other.
    """
    with reading(file):
        names = get_unsafe_globals_in_checkpoint(str(file))
    if strange := sorted(name for name in names if name.partition(".")[0] not in TRAINER_PACKAGES):
        raise CheckpointError(
            f"{file} holds more than a trainer saves, which was not loaded: {', '.join(strange[:4])}. Get the file from"
            " where you trust it."
        )
    with reading(file), safe_globals([(_StandIn, name) for name in names]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


class _StandIn:
    """In place of any object that is not needed: takes whatever it is made of and does nothing with it."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _rank(file: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", file.name)
    assert match is not None  # it was found by this name
    return int(match[1])


def _put_together(ckpt_dir: Path, pieces: list[Path]) -> Tensors:
    """The trained tensors of a ZeRO-3 checkpoint: rank after rank holds an equal share of each, the last one padded,
    all in one flat row.
    """
    shapes: dict[str, torch.Size] = {}
    for group in read_states(pieces[0]).get("param_shapes") or []:
        shapes |= group
    flats = []
    for rank in range(len(pieces)):
        files = sorted(ckpt_dir.glob(ZERO3_WEIGHTS.format(rank)))
        if len(files) != 1:
            raise CheckpointError(
                f"{ckpt_dir} has {len(files)} files {ZERO3_WEIGHTS.format(rank)} where one is wanted: copy the whole"
                " checkpoint folder again."
            )
        state = read_states(files[0]).get("optimizer_state_dict") or {}
        groups, ranks = state.get("fp32_flat_groups"), state.get("partition_count")
        if not groups or ranks != len(pieces):
            raise CheckpointError(
                f"{files[0]} is not one of the {len(pieces)} parts of a ZeRO-3 checkpoint (it says {ranks}): copy the"
                " whole checkpoint folder again."
            )
        flats.append(torch.cat([group.flatten() for group in groups]))
    model, start = {}, 0
    for name, shape in shapes.items():
        share = -(-shape.numel() // len(flats))
        model[name] = torch.cat([flat[start : start + share] for flat in flats])[: shape.numel()].reshape(shape)
        start += share
    if start > len(flats[0]):
        raise CheckpointError(f"{ckpt_dir} holds fewer weights than it lists: copy the whole checkpoint folder again.")
    return model


def _layer_files(ckpt_dir: Path) -> dict[int, Path]:
    """Pipeline layer to its file, in order."""
    found = {
        p: re.fullmatch(r"layer_(\d+)(-model_\d+)?-model_states\.pt", p.name) for p in sorted(ckpt_dir.glob("layer_*"))
    }
    files = [(int(match[1]), path) for path, match in found.items() if match]
    if not files:
        raise CheckpointError(f"{ckpt_dir} has no layer_00-model_states.pt. {_what_it_is(ckpt_dir)}")
    if len(dict(files)) < len(files):
        raise CheckpointError(
            f"{ckpt_dir} was split over several ranks by tensor parallelism, which can't be converted here."
        )
    return dict(sorted(files))


def _read_layer(file: Path) -> Tensors:
    tensors = read_states(file)
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file} holds no dict of tensors: is it a layer of a pipeline?")
    return tensors


def _projection(file: Path, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    if absent := sorted(PROJECTION.keys() - tensors.keys()):
        raise CheckpointError(
            f"{file} has no {' and no '.join(absent)}: only checkpoints of the original's pipeline can be converted"
            " here."
        )
    return {name: tensors[source] for source, name in PROJECTION.items()}


def _check_blocks(ckpt_dir: Path, blocks: Mapping[int, Tensors]) -> None:
    """Raise CheckpointError if there are none, if one is missing between two, or if they differ in what they hold."""
    if not blocks:
        raise CheckpointError(
            f"no layer in {ckpt_dir} holds a block of a language model: use pipe_proj2pth for the projection alone."
        )
    missing = sorted({*range(min(blocks), max(blocks) + 1)} - blocks.keys())
    names = set(next(iter(blocks.values())))
    other = [index for index, tensors in blocks.items() if set(tensors) != names]
    if missing or other:
        index, what = (
            (missing[0], "is missing or holds no block")
            if missing
            else (other[0], f"holds other tensors than layer {min(blocks)}")
        )
        raise CheckpointError(f"layer {index} in {ckpt_dir} {what}: copy the whole checkpoint folder again.")


def _what_it_is(ckpt_dir: Path) -> str:
    """What to do about a folder that has not what is asked for."""
    if list(ckpt_dir.glob("layer_*-model_states.pt")):
        return "It is a checkpoint of the pipeline: use pipe_proj2pth, or pipemodel2pth for a trained LLM."
    if (ckpt_dir / MODEL_STATES).is_file():
        return "It looks like a ZeRO checkpoint: deepspeed2pth reads those."
    return "Give the folder of one epoch or step, such as deepspeed_ckpt/epoch_9."


def _holds_tensors(content: object) -> TypeGuard[dict[str, torch.Tensor]]:
    return isinstance(content, dict) and bool(content) and all(isinstance(t, torch.Tensor) for t in content.values())


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> Path:
    """Write a bare dict, in the types the tensors have; the file appears whole or not at all."""
    # DeepSpeed's tensors may be windows of one large buffer, all of which would be written with each.
    own = {
        name: t.detach().clone() if t.untyped_storage().nbytes() > t.nbytes else t.detach()
        for name, t in tensors.items()
    }
    temp = file.with_suffix(".tmp")
    torch.save(own, temp)
    temp.replace(file)
    return file
