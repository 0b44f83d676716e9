"""What a recipe needs on which hardware, before anything is loaded: memory of each rank, time of a step, and settings
that fit.

What a model's parts keep and compute is lavis.parallel.footprint's; here are the ways to lay a run out over ranks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from lavis.config.recipe import Recipe
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.paths import CONFIGS_ROOT, resolve
from lavis.data.assemble import load_tokenizer
from lavis.data.sources import has_images
from lavis.models.configs import VlmConfig
from lavis.models.llm import new_config
from lavis.models.stages import SPLITTABLE
from lavis.parallel.footprint import Footprint, Footprints, MicroBatch, Modules, Precision
from lavis.parallel.layout import BUCKET_BYTES, Layout
from lavis.weights.gguf import gguf_arguments, is_gguf
from lavis.weights.qwen1 import qwen2_config
from lavis.weights.qwen1_format import is_qwen1

GPUS = {
    "3090": (24, 71),
    "4090": (24, 165),
    "a6000": (48, 155),
    "l40s": (48, 362),
    "a100-40": (40, 312),
    "a100": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
}
"""Name to memory in GiB and dense bf16 TFLOP/s with fp32 accumulation, as published."""
REACHED = 0.5
"""Share of the published arithmetic that training reaches; an assumption."""
CUDA_BYTES = 0.8 * 2**30
"""What a CUDA process takes beside its tensors: context, cuBLAS, NCCL, and what the allocator can't use; an assumption.
"""
FREE_SHARE = 0.03
"""Share of the memory that a plan leaves unused."""
_MOMENTS = {"adamw_8bit": 0.5, "lion": 1, "muon": 1}
"""Size of an optimiser's state relative to what is trained in fp32, where it isn't AdamW's 2."""
_MOST_TOKENS = 8192
"""Micro-batches beyond this many tokens make nothing faster."""


@dataclass(frozen=True)
class Machine:
    """What each rank has. device: `cuda` or `cpu`; memory in bytes; flops and link (to other ranks) per second, flops
    None if not known; runtime: bytes
    that a process takes before it holds a tensor."""

    device: str
    memory: float
    flops: float | None
    link: float = 12e9
    runtime: float = CUDA_BYTES

    @classmethod
    def gpu(cls, name: str, memory: float | None = None) -> Machine:
        """A card of the table, or with another size of memory. Raises ConfigError for an unknown name."""
        if name not in GPUS:
            raise ConfigError(f"unknown GPU {name!r}. Known: {', '.join(GPUS)}.")
        gigabytes, teraflops = GPUS[name]
        return cls("cuda", memory or gigabytes * 2**30, teraflops * 1e12 * REACHED)

    @classmethod
    def this(cls, device: torch.device) -> Machine:
        """The hardware we run on; a CPU's arithmetic is measured, which takes a moment."""
        if device.type == "cuda":
            return cls("cuda", torch.cuda.get_device_properties(device).total_memory, None)
        return cls("cpu", psutil.virtual_memory().total, matmul_rate(), 2e9, psutil.Process().memory_info().rss)


def matmul_rate(side: int = 1024) -> float:
    """FLOP/s of this process's CPU threads in fp32, measured."""
    a, b = torch.ones(side, side), torch.ones(side, side)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


@dataclass(frozen=True)
class RankMemory:
    """Expected peak of one rank, bytes, by what it is for."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    workspace: float
    runtime: float

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations + self.workspace + self.runtime


@dataclass(frozen=True)
class Plan:
    """A layout with its settings and what is expected of it. One entry of memory and footprints for each stage."""

    layout: Layout
    batch: MicroBatch
    micro_batches: int
    recompute: bool
    blocks: tuple[int, ...]
    footprints: tuple[Footprint, ...]
    memory: tuple[RankMemory, ...]
    seconds: float | None

    @property
    def peak(self) -> float:
        """Of the rank that needs most, bytes."""
        return max(m.total for m in self.memory)

    def fits(self, machine: Machine) -> bool:
        """Whether all ranks have room; on a CPU they share it."""
        if machine.device == "cpu":
            return sum(m.total for m in self.memory) * self.layout.replicas <= machine.memory * (1 - FREE_SHARE)
        return self.peak <= machine.memory * (1 - FREE_SHARE)


def llm_config_of(name: str) -> PreTrainedConfig:
    """Configuration of the LLM that a recipe names `name`: from its files, else the known one of that name, else the
    hub's.

    Raises CheckpointError if there is none.
    """
    folder = resolve(name)
    if is_gguf(name):
        return AutoConfig.from_pretrained(**gguf_arguments(name))
    if is_qwen1(folder):
        return qwen2_config(folder)
    known = yaml.safe_load((CONFIGS_ROOT / "llms.yaml").read_text(encoding="utf-8"))
    if not folder.exists() and folder.name in known:
        return AutoConfig.for_model(**known[folder.name])
    try:
        return AutoConfig.from_pretrained(folder if folder.exists() else name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.llm.weights {name}: no configuration is found ({folder} or the hub): put its config.json there."
        ) from error


def planned_llm(config: VlmConfig) -> PreTrainedConfig:
    """Configuration of the LLM of a recipe's model, an existing or a new one."""
    if config.llm.weights:
        return llm_config_of(config.llm.weights)
    return new_config(config.llm.config, len(load_tokenizer(config)), {})


class Planner:
    """Plans of one recipe on one machine.

    tokens: of the longest row (default: the recipe's limit); images and supervised: how many of each in such a row;
    samples: rows of an optimiser step.

    Raises ConfigError for a model without an LLM.
    """

    def __init__(
        self,
        recipe: Recipe,
        machine: Machine,
        *,
        tokens: int | None = None,
        images: int | None = None,
        supervised: int | None = None,
        samples: int | None = None,
        ranks: int = 1,
    ) -> None:
        config: Any = recipe.model
        data = recipe.data
        if not config.splits:
            raise ConfigError(f"model.arch {config.arch}: plans are made for models with an LLM alone.")
        self.config: VlmConfig = config
        self.recipe, self.data, self.machine = recipe, data, machine
        self.llm_config = planned_llm(config)
        self._modules = Modules()
        self._footprints = functools.cache(self._make_footprints)  # of this instance, and gone with it
        self.tokens = tokens or (data.pack_length if data.packing else config.max_length)
        sees = config.sees and (any(has_images(e) for _, e in data.entries()) or not data.train)
        # samples of a packed row, if all are of the longest length: more and shorter ones need no more
        self.row_samples = max(1, self.tokens // config.max_length) if data.packing else 1
        self.images = images if images is not None else sees * self.row_samples
        self.supervised = supervised or max(1, self.tokens - self.images * config.tokens_per_tile)
        self.samples = (
            samples
            or recipe.train.global_batch_size
            or recipe.train.micro_batch_size * recipe.train.accumulation * max(1, ranks // recipe.parallel.num_stages)
        )
        train = recipe.train
        budget: Any = train.micro_batch_tokens  # in the longest rows
        self.rows = max(1, budget // self.tokens) if isinstance(budget, int) else train.micro_batch_size
        mixed = train.amp and config.enable_autocast and (machine.device == "cuda" or train.autocast_on_cpu)
        amp = {"bf16": torch.bfloat16, "fp16": torch.float16}[train.autocast_dtype] if mixed else None
        self.precision = Precision.on(machine.device, config, amp)

    def _make_footprints(self, rows: int, recompute: bool) -> Footprints:
        batch = MicroBatch(
            rows,
            self.tokens,
            rows * self.images,
            rows * self.supervised,
            self.row_samples,
            self.data.cache_features is True,
        )
        config = self.config.with_recomputation(recompute)
        return Footprints(config, self.llm_config, batch, self.precision, self._modules)

    def split(self, stages: int, rows: int, recompute: bool) -> list[int]:
        """Blocks of each stage such that the dearest one is as cheap as can be.

        Raises ConfigError for more stages than blocks.
        """
        f, blocks = self._footprints(rows, recompute), self.llm_config.num_hidden_layers
        if stages > blocks:
            raise ConfigError(f"{stages} stages but the LLM has {blocks} blocks: choose --num-stages of at most that.")
        if stages == 1:
            return [blocks]
        # costs are linear in blocks: a stage of two and one of three say what a block more costs
        two, three = ([f.stage(n, first=i == 0, last=i == 1).flops for i in (0, 1)] for n in (2, 3))
        block = f.stage(2, first=False, last=False).flops / 2

        def price(sizes: list[int]) -> float:
            first, last = (a + (n - 2) * (b - a) for a, b, n in zip(two, three, (sizes[0], sizes[-1]), strict=True))
            return max(first, last, *(n * block for n in sizes[1:-1]))

        return min(_splits(blocks, stages), key=price)

    def plan(
        self, layout: Layout, *, rows: int | None = None, recompute: bool | None = None, blocks: list[int] | None = None
    ) -> Plan:
        """What is expected of `layout` with micro-batches of so many rows. Raises ConfigError if it is impossible."""
        rows = rows or self.rows
        recompute = self.config.recomputes is True if recompute is None else recompute
        f = self._footprints(rows, recompute)
        sizes = blocks or self.split(layout.stages, rows, recompute)
        last = len(sizes) - 1
        footprints = tuple(f.stage(n, first=i == 0, last=i == last) for i, n in enumerate(sizes))
        micro_batches = max(1, round(self.samples / (rows * layout.replicas)))
        memory = tuple(self._memory(stage, layout, i, micro_batches, f.batch) for i, stage in enumerate(footprints))
        seconds = self._seconds(footprints, layout, micro_batches, f.batch)
        return Plan(layout, f.batch, micro_batches, recompute, tuple(sizes), footprints, memory, seconds)

    def _memory(self, f: Footprint, layout: Layout, stage: int, micro_batches: int, batch: MicroBatch) -> RankMemory:
        # Each term is held against a measured peak, three sizes by five layouts, in benchmarks/plan_memory.py.
        cpu, ranks = self.machine.device == "cpu", layout.ranks
        # fp32 whatever is frozen beside it. One forward, one backward: a stage has as many micro-batches between the
        # two as there are stages behind it, itself included.
        trained, in_flight = 4 * f.trained, min(layout.stages - stage, micro_batches)
        # In the update temporaries of the size of all that is trained, as "foreach" AdamW has them on a GPU under ZeRO;
        # elsewhere it is fused and takes none, which is not relied on.
        weights, gradients, update = f.weight_bytes, trained, trained
        optimizer = _MOMENTS.get(self.recipe.optim.name, 2) * trained
        if cpu:  # AdamW goes through the parameters one by one
            update = min(2 * 4 * f.largest_trained, trained)
        extra = 0.0
        if layout.zero:
            optimizer, update = 3 * trained / ranks, update / ranks  # and fp32 copies of its share
            gradients = trained / ranks if layout.zero > 1 else gradients + trained / ranks
            # the flat buffer in which gradients meet: DeepSpeed takes it at once, however little there is to sum
            extra = _bucket(self.recipe, f.trained)
        elif layout.replicas > 1:  # DDP's buckets; DeepSpeed's pipeline flattens all gradients to sum them
            extra = min(trained, BUCKET_BYTES + 4 * f.largest_trained) if layout.stages == 1 else trained
        if layout.zero == 3:
            fetched, buffer = _fetched(self.recipe, f)
            weights, extra = f.weight_bytes / ranks + fetched, extra + buffer
        # activations and the update's temporaries are never there at once, so the larger of the two counts
        held = f.held * in_flight
        work = max(f.peak - f.held, update - held, 0.0) + extra
        if micro_batches == 1 and layout.stages == 1:  # gradients appear as activations go
            gradients = max(0.0, gradients - max(0.0, f.peak - update))
        # a step's batches are all there before it begins, so that its tokens can be counted; a GPU's wait on the host
        waiting = (
            4 * 3 * self.config.tower.image_size**2 * batch.images * micro_batches
            if cpu and stage == 0 and not batch.cached and self.config.tower
            else 0.0
        )
        return RankMemory(weights, optimizer, gradients, held, work + waiting, self.machine.runtime)

    def _seconds(
        self, footprints: tuple[Footprint, ...], layout: Layout, micro_batches: int, batch: MicroBatch
    ) -> float | None:
        if self.machine.flops is None:
            return None
        slots = micro_batches + layout.stages - 1  # a pipeline fills and drains
        others = (layout.ranks - 1) / layout.ranks
        rate = self.machine.flops / (layout.ranks if self.machine.device == "cpu" else 1)  # ranks share the cores
        compute = slots * max(f.flops for f in footprints) / rate
        sent = 2 * 4 * max(f.trained for f in footprints) * (layout.replicas > 1)
        if layout.zero == 3:  # weights are fetched for the forward and again for the backward pass
            sent += 2 * micro_batches * footprints[0].weight_bytes * others
        if layout.stages > 1:
            width = self.llm_config.get_text_config().hidden_size
            sent += 2 * slots * batch.rows * batch.tokens * width * self.precision.frozen_llm.itemsize
        return compute + sent / self.machine.link

    def layouts(self, ranks: int) -> Iterator[Layout]:
        """Those that `ranks` allow for this model."""
        yield Layout(ranks)
        if ranks == 1:
            return
        yield Layout(ranks, zero=2)
        yield Layout(ranks, zero=3)
        if self.llm_config.model_type in SPLITTABLE and not self.config.llm.quantization:
            yield from (
                Layout(ranks, stages)
                for stages in range(2, ranks + 1)
                if ranks % stages == 0 and stages <= self.llm_config.num_hidden_layers
            )

    def best(self, layout: Layout) -> Plan:
        """The fastest plan of `layout` that fits: as the recipe says, else with recomputation, else with smaller
        micro-batches; then with larger ones.

        If none fits, the one that needs least.
        """
        tried: list[Plan] = []
        rows = self.rows
        while rows:
            for recompute in (False, True) if self.config.recomputes is not True else (True,):
                tried.append(self.plan(layout, rows=rows, recompute=recompute))
                if tried[-1].fits(self.machine):
                    return self._grown(tried[-1])
            rows //= 2
        return min(tried, key=lambda plan: plan.peak)

    def _grown(self, plan: Plan) -> Plan:
        while True:
            rows = 2 * plan.batch.rows
            slots = self.samples / (rows * plan.layout.replicas)
            if (
                rows * self.tokens > _MOST_TOKENS
                or slots < 1
                or slots % 1
                or (plan.layout.stages > 1 and slots < 8 * plan.layout.stages)  # fewer would leave stages idle
            ):
                return plan
            larger = self.plan(plan.layout, rows=rows, recompute=plan.recompute, blocks=list(plan.blocks))
            if not larger.fits(self.machine):
                return plan
            plan = larger


def _bucket(recipe: Recipe, elements: float) -> float:
    zero = recipe.parallel.deepspeed.get("zero_optimization") or {}
    size = min(float(zero.get("reduce_bucket_size", 5e8)), elements)
    return 4 * size * (2 if zero.get("overlap_comm") else 1)


def _fetched(recipe: Recipe, f: Footprint) -> tuple[float, float]:
    """Bytes that ZeRO-3 has beside a rank's share, where it has most: whole weights, and the flat buffer in which
    several of them arrive.

    It fetches ahead until so many are there as may be, and between forward and backward keeps those used again within
    the reuse distance, there and back.
    """
    zero = recipe.parallel.deepspeed.get("zero_optimization") or {}
    live = max(
        float(zero.get("stage3_max_live_parameters", 1e9)), float(zero.get("stage3_max_reuse_distance", 1e9)) / 2
    )
    bucket = float(zero.get("stage3_prefetch_bucket_size", 5e7))
    element = f.weight_bytes / f.parameters
    return min(f.weight_bytes, live * element), min(f.weight_bytes, bucket * element + f.largest_bytes)


def _splits(blocks: int, stages: int) -> Iterator[list[int]]:
    """Sizes of stages, at least 1 each; those between the first and the last differ by 1 at most."""
    between = stages - 2
    for first in range(1, blocks - stages + 2):
        for last in range(1, blocks - first - between + 1):
            inner = blocks - first - last
            if between:
                yield [first, *(inner // between + (i < inner % between) for i in range(between)), last]
            elif not inner:
                yield [first, last]
