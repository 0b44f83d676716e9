"""`lavis plan`: whether a recipe fits on given hardware, how it is best laid out, and what a step costs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from lavis.core.collection import no_collection

if TYPE_CHECKING:
    from lavis.parallel.plan import Machine, Plan, Planner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis plan`."""
    parser.add_argument("recipe", help="file, or the name of a shipped recipe")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="card to plan for, such as 3090, 4090, a100 or h100 (default: what this machine has)",
    )
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of each card: 24GiB, 22GB")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="longest row (default: model.max_length, or data.pack_length)"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="images of a row (default 1, or as many as fit into a packed one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plans; 0 if one fits, else 1."""
    with no_collection():  # what it makes is small and gone at its end
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from lavis.config.recipe import load_recipe
    from lavis.core.errors import ConfigError
    from lavis.parallel.plan import Planner

    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: give at least 1.")
    recipe = load_recipe(args.recipe, args.options)
    machine = _machine(args, recipe.run.device)
    planner = Planner(recipe, machine, tokens=args.tokens, images=args.images, ranks=args.gpus)
    plans = [planner.best(layout) for layout in planner.layouts(args.gpus)]
    fitting = [plan for plan in plans if plan.fits(machine)]
    best = (
        min(fitting, key=lambda plan: plan.seconds or sum(f.flops for f in plan.footprints) * plan.micro_batches)
        if fitting
        else None
    )
    command = _command(args, best) if best else None
    if args.json:
        print(
            json.dumps(
                {
                    "machine": dataclasses.asdict(machine),
                    "plans": [_as_dict(p, machine) for p in plans],
                    "proposed": command,
                },
                indent=1,
            )
        )
        return 0 if best else 1
    print("\n".join(_report(args, planner, plans, best, command)))
    return 0 if best else 1


def _machine(args: argparse.Namespace, device: str) -> Machine:
    import torch

    from lavis.parallel.plan import Machine

    memory = _size(args.gpu_memory) if args.gpu_memory else None
    if args.gpu or memory:
        machine = Machine.gpu(args.gpu or "3090", memory)
        return machine if args.gpu else dataclasses.replace(machine, flops=None)
    return Machine.this(torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"))


def _size(text: str) -> float:
    from lavis.core.errors import ConfigError

    match = re.fullmatch(r"([\d.]+)\s*(GiB|GB|MiB|MB)", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"--gpu-memory {text!r} is no size: write 24GiB or 22GB.")
    return float(match[1]) * {"gib": 2**30, "gb": 1e9, "mib": 2**20, "mb": 1e6}[match[2].lower()]


def _report(
    args: argparse.Namespace, planner: Planner, plans: list[Plan], best: Plan | None, command: str | None
) -> list[str]:
    from lavis.parallel.plan import Layout

    machine = planner.machine
    whole = planner.plan(Layout(1), recompute=False)
    where = (
        f"{args.gpus} x {machine.memory / 2**30:.0f} GiB"
        if machine.device == "cuda"
        else f"this machine's CPU, {machine.memory / 2**30:.0f} GiB"
    )
    llm = planner.config.llm.weights or f"a new {planner.llm_config.model_type}"
    lines = [
        f"{args.recipe} on {where}: {llm}, rows of {planner.tokens} tokens with {planner.images} image(s),"
        f" {planner.samples} rows a step"
    ]
    f = whole.footprints[0]
    lines.append(
        f"{f.parameters / 1e9:.2f} B parameters, {f.trained:,.0f} trained; {f.flops / whole.batch.rows / 1e12:.2f}"
        " TFLOP a row"
    )
    head = (
        f"{'':34}{'micro-batch':>12}{'recompute':>10}{'weights':>9}{'optimiser':>10}{'gradients':>10}"
        f"{'activations':>12}{'workspace':>10}{'runtime':>9}{'peak':>8}"
        f"  {'fits':5}{'step':>9}"
    )
    lines += ["", head + "   (GiB of each rank)"]
    for plan in plans:
        lines += _rows(plan, machine)
    lines.append("")
    if best is None:
        lines.append(
            "Nothing fits: more or larger GPUs (--gpus, --gpu), a shorter model.max_length, or"
            " model.llm.quantization=int4."
        )
    else:
        lines += [f"Proposed: {best.layout}", f"  {command}"]
        if best.batch.rows > 1 and not planner.data.packing:
            total = best.batch.rows * best.batch.tokens
            lines.append(
                f"  Samples of unlike lengths: data.packing=true data.pack_length={total} train.micro_batch_size=1"
                " takes as much memory and pads less."
            )
    if machine.device == "cpu":
        lines.append(
            "Memory is what the tensors and the process need; glibc's malloc can hold half as much again of what was"
            " freed."
        )
    else:
        lines.append(
            "Times assume half of a card's published arithmetic."
            if machine.flops
            else "Times are given for a known card: --gpu NAME."
        )
    return lines


def _rows(plan: Plan, machine: Machine) -> list[str]:
    rows = []
    for i, memory in enumerate(plan.memory):
        name = str(plan.layout) if i == 0 else ""
        if len(plan.memory) > 1:
            f = plan.footprints[i]
            rows += [name] if i == 0 else []
            name = f"  stage {i}: {plan.blocks[i]} blocks, {f.parameters / 1e9:.2f} B, {f.flops / 1e12:.2f} TFLOP"
        parts = (
            memory.weights,
            memory.optimizer,
            memory.gradients,
            memory.activations,
            memory.workspace,
            memory.runtime,
        )
        widths = (9, 10, 10, 12, 10, 9)
        numbers = "".join(f"{value / 2**30:{width}.2f}" for value, width in zip(parts, widths, strict=True))
        last = i == len(plan.memory) - 1
        fits = ("yes" if plan.fits(machine) else "no") if last else ""
        seconds = f"{plan.seconds:.3g} s" if last and plan.seconds is not None else ""
        batch = f"{plan.batch.rows} (x {plan.micro_batches})" if i == 0 else ""
        recompute = ("on" if plan.recompute else "off") if i == 0 else ""
        rows.append(f"{name:34}{batch:>12}{recompute:>10}{numbers}{memory.total / 2**30:8.2f}  {fits:5}{seconds:>9}")
    return rows


def _command(args: argparse.Namespace, plan: Plan) -> str:
    layout = plan.layout
    script = "train_pipeline.py" if layout.stages > 1 else "train.py"
    flags = f" --num-stages {layout.stages}" if layout.stages > 1 else " --use-deepspeed" if layout.zero else ""
    options = [*args.options, f"train.micro_batch_size={plan.batch.rows}", f"train.accumulation={plan.micro_batches}"]
    options.append(f"model.llm.recompute={str(plan.recompute).lower()}")
    options += [f"parallel.deepspeed.zero_optimization.stage={layout.zero}"] if layout.zero else []
    launcher = f"python -m torch.distributed.run --nproc_per_node={layout.ranks}" if layout.ranks > 1 else "python"
    return f"{launcher} {script} --cfg-path {args.recipe}{flags} --options {shlex.join(options)}"


def _as_dict(plan: Plan, machine: Machine) -> dict[str, Any]:
    return {
        "layout": str(plan.layout),
        "stages": plan.layout.stages,
        "zero": plan.layout.zero,
        "batch_size_train": plan.batch.rows,
        "accum_grad_iters": plan.micro_batches,
        "llm_grad_checkpoint": plan.recompute,
        "stage_blocks": list(plan.blocks),
        "memory": [dataclasses.asdict(m) | {"total": m.total} for m in plan.memory],
        "flops_per_micro_batch": [f.flops for f in plan.footprints],
        "parameters": [f.parameters for f in plan.footprints],
        "seconds_per_step": plan.seconds,
        "fits": plan.fits(machine),
    }
