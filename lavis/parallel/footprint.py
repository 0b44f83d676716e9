"""What a micro-batch costs a stage in memory and arithmetic, found by running the real modules on tensors that have
shapes and no data.

Whatever a model's code keeps, recomputes or casts is counted as it does it; nothing is allocated, and a model of any
size takes seconds.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lavis.models.configs import VlmConfig
from lavis.models.llm import DTYPES, hidden_states
from lavis.models.scoring import Scorer
from lavis.models.stages import Part, Stage, llm_part
from lavis.models.vlm import Vlm
from lavis.parallel.costs import CostMode, Spent

_IMAGE_ID = 1
"""Stands for the placeholder's id: which it is has no effect on costs."""
_DEPTH = 2
"""Blocks of LLM and tower that are run; what a block more costs is known from running one more."""
_QUANTIZED = {None: 1.0, "int8": 0.5, "int4": 4.5 / 16}
"""Bytes of a block's weights relative to 16 bits a weight; NF4 has a scale of 32 bits for 64 weights."""
_Step = Callable[[torch.Tensor], torch.Tensor]
_UNMASKED = "unmasked_sdpa"
# With data transformers sees that rows are not packed and does without a mask; with shapes alone it can't. For an
# attention that it knows no mask of, it makes none: this is the same function by another name.
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True)
class MicroBatch:
    """The shape of what goes through a model at once: `rows` of `tokens` each, and how many images and supervised
    tokens are in all of them.

    `samples`: how many a row holds, of like length. `cached`: images come as the tower's features.
    """

    rows: int
    tokens: int
    images: int
    supervised: int
    samples: int = 1
    cached: bool = False

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the samples of a row."""
        return tuple(self.tokens // self.samples + (i < self.tokens % self.samples) for i in range(self.samples))


@dataclass(frozen=True)
class Precision:
    """Types: `amp` of mixed precision (None: none), of a frozen LLM's weights, and of a frozen tower's."""

    amp: torch.dtype | None = None
    frozen_llm: torch.dtype = torch.float32
    frozen_tower: torch.dtype = torch.float32

    @classmethod
    def on(cls, device: str, config: VlmConfig, amp: torch.dtype | None) -> Precision:
        """What a model is given on a `cpu` or on a `cuda` device that has bf16."""
        if device != "cuda":
            return cls(amp)
        return cls(amp, torch.bfloat16, DTYPES[config.tower.precision] if config.tower else torch.float32)


@dataclass(frozen=True)
class Footprint:
    """A stage: its parameters (elements, bytes) and what one micro-batch does there (bytes, FLOPs), gradients of
    parameters left out.

    largest_bytes: of the largest parameter. held: alive between forward and backward. The peaks are of what is alive of
    this micro-batch: while images are encoded and
    embedded, while the blocks run forward, and in the head and the backward pass.
    """

    parameters: float
    trained: float
    largest_trained: float
    weight_bytes: float
    largest_bytes: float
    held: float
    front_peak: float
    blocks_peak: float
    back_peak: float
    forward_flops: float
    backward_flops: float

    @property
    def peak(self) -> float:
        """Most bytes alive at a time."""
        return max(self.front_peak, self.blocks_peak, self.back_peak)

    @property
    def flops(self) -> float:
        """Forward and backward, recomputation included."""
        return self.forward_flops + self.backward_flops


def _sum(terms: Iterable[tuple[int, Footprint]]) -> Footprint:
    terms = list(terms)
    return Footprint(*(sum(n * getattr(f, field.name) for n, f in terms) for field in fields(Footprint)))


class Modules:
    """The shallow stages of a model that footprints run. Each is built once for batches of all shapes, and what
    frozen parts do with images is found once for all stages behind them.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.stages: dict[tuple[object, ...], Stage] = {}
        self.spent: dict[tuple[str, int, torch.Size], Spent] = {}
        self.fronts: dict[tuple[MicroBatch, int], Footprint] = {}


class Footprints:
    """Footprints of stages of a model, of any depth: a few shallow ones of each kind are run, and what lies between
    them is multiplied.

    modules: shared by footprints of the same model and precision.
    """

    def __init__(
        self,
        config: VlmConfig,
        llm_config: PreTrainedConfig,
        batch: MicroBatch,
        precision: Precision,
        modules: Modules | None = None,
    ) -> None:
        self.batch, self.blocks = batch, llm_config.num_hidden_layers
        self._modules = modules or Modules()
        self._config, self._llm_config, self._precision = config, llm_config, precision
        self._tower_depth = (config.tower.blocks() or 0) if config.tower else 0
        # on the instance: a cache of the class would keep all instances alive
        self._cached = functools.cache(self._trace)
        self._cached_stages = functools.cache(self._stage)

    def stage(self, blocks: int, *, first: bool = True, last: bool = True) -> Footprint:
        """A stage of so many blocks of the LLM; the whole model if it is first and last and has all of them."""
        return self._cached_stages(blocks, first, last)

    def _stage(self, blocks: int, first: bool, last: bool) -> Footprint:
        low, tower_low = min(blocks, _DEPTH), min(self._tower_depth, _DEPTH)
        base = self._cached(low, tower_low, first, last)
        terms = [(1, base)]
        if count := blocks - low:
            terms += [(count, self._cached(low + 1, tower_low, first, last)), (-count, base)]
        if count := (self._tower_depth - tower_low) * first:
            terms += [(count, self._deeper(low, tower_low, last)), (-count, base)]
        whole = _sum(terms)
        # a trace has no quantised kernels: it runs 16-bit weights, and what those take less is subtracted
        kind = self._config.llm.quantization
        saved = (1 - _QUANTIZED[kind]) * blocks * self._block_bytes() if kind else 0.0
        return replace(whole, weight_bytes=whole.weight_bytes - saved)

    def _deeper(self, blocks: int, tower_depth: int, last: bool) -> Footprint:
        """A first stage whose tower has a block more than `tower_depth`: a frozen one changes nothing behind it."""
        base = self._cached(blocks, tower_depth, True, last)
        tower = self._built(blocks, tower_depth, True, last).front.visual_encoder
        if tower is None or tower.trained:
            return self._cached(blocks, tower_depth + 1, True, last)
        low, deep = (self._front(depth) for depth in (tower_depth, tower_depth + 1))
        return replace(
            base,
            parameters=base.parameters + deep.parameters - low.parameters,
            weight_bytes=base.weight_bytes + deep.weight_bytes - low.weight_bytes,
            largest_bytes=max(base.largest_bytes, deep.largest_bytes),
            front_peak=deep.front_peak,
            forward_flops=base.forward_flops + deep.forward_flops - low.forward_flops,
        )

    def _front(self, tower_depth: int) -> Footprint:
        """What comes before the blocks."""
        fronts, key = self._modules.fronts, (self.batch, tower_depth)
        if key not in fronts:
            fronts[key] = self._trace(1, tower_depth, True, False, front_alone=True)
        return fronts[key]

    def _block_bytes(self) -> float:
        return self._cached(2, 0, False, False).weight_bytes - self._cached(1, 0, False, False).weight_bytes

    def _trace(self, blocks: int, tower_depth: int, first: bool, last: bool, front_alone: bool = False) -> Footprint:
        with torch.random.fork_rng(devices=[]):  # a run that is planned goes on as if it were not
            stage = self._built(blocks, tower_depth, first, last)
            with self._modules.mode, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what autocast has to say of this machine's processor
                costs = CostMode([*stage.parameters(), *stage.buffers()])
                if first:
                    self._frozen_parts(stage.front, tower_depth, costs)
                return _run(stage, self.batch, self._precision, costs, front_alone)

    def _built(self, blocks: int, tower_depth: int, first: bool, last: bool) -> Stage:
        key = (blocks, tower_depth, first, last, self._config.recomputes, self.batch.samples == 1)
        if key not in self._modules.stages:
            # which stage it is shows in nothing but whether it is the first or the last
            part = Part(0 if first else 1, (1 if first else 2) + (not last), 0, blocks)
            config, llm_config = _bare(self._config, tower_depth), _deep_enough(self._llm_config, blocks)
            stage = _build(config, llm_config, part, self._precision)
            if self.batch.samples == 1 and stage.llm.config._attn_implementation == "sdpa":
                stage.llm.set_attn_implementation(_UNMASKED)
            with self._modules.mode:
                _place(stage)
            self._modules.stages[key] = stage
        return self._modules.stages[key]

    def _once(self, part: str, tower_depth: int, step: _Step, costs: CostMode, images: torch.Tensor) -> torch.Tensor:
        """What a frozen part makes of images: run the first time, and known from then on."""
        key, spent = (part, tower_depth, images.shape), self._modules.spent
        if key in spent:
            return costs.spend(spent[key])
        out, spent[key] = costs.spent(partial(step, images))
        return out

    def _frozen_parts(self, front: Vlm, tower_depth: int, costs: CostMode) -> None:
        """Have `front` run the parts of it that have no graph once for all stages behind them."""
        tower, connector = front.visual_encoder, front.connector
        if tower is not None and not tower.trained:
            vars(tower)["encode"] = partial(self._once, "tower", tower_depth, partial(type(tower).encode, tower), costs)
        if connector is not None and front.tower_frozen:
            step = partial(type(connector).encode, connector)
            vars(connector)["encode"] = partial(self._once, "connector", 0, step, costs)


def _bare(config: VlmConfig, tower_depth: int) -> VlmConfig:
    """`config` of a model that reads no files, its tower of so many blocks where their number can be chosen."""
    tower, connector = config.tower, config.connector
    if tower is not None:
        tower = replace(tower if tower.blocks() is None else tower.with_depth(tower_depth), weights=None)
    if connector is not None:
        connector = replace(connector, weights=None)
    return replace(config, tower=tower, connector=connector, llm=replace(config.llm, device_map=None))


def _deep_enough(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """`config` with a kind of layer for each of `blocks`, which can be more than the model has."""
    kinds = getattr(config, "layer_types", None)
    if not kinds or len(kinds) >= blocks:
        return config
    longer = copy.deepcopy(config)
    longer.layer_types = [*kinds, *[kinds[-1]] * (blocks - len(kinds))]
    return longer


def _build(config: VlmConfig, llm_config: PreTrainedConfig, part: Part, precision: Precision) -> Stage:
    with torch.device("meta"):
        llm = llm_part(llm_config, part, torch.float32 if config.llm.train == "full" else precision.frozen_llm)
        stage = Stage(config, llm, part, _IMAGE_ID).train()
    tower = stage.front.visual_encoder if part.is_first else None
    if tower is not None and stage.front.tower_frozen and precision.frozen_tower != torch.float32:
        tower.cast_frozen(precision.frozen_tower)
    return stage


def _place(stage: Stage) -> None:
    """From the meta device, where mixed precision does not act, to the CPU; no gradient of a parameter stays."""
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        for name, p in module.named_parameters(recurse=False):
            own = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            setattr(module, name, own)
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(_drop_gradient)
    if stage.part.is_first and stage.part.is_last:
        stage.llm.tie_weights()


def _drop_gradient(p: nn.Parameter) -> None:
    p.grad = None


def _run(
    stage: Stage, batch: MicroBatch, precision: Precision, costs: CostMode, front_alone: bool = False
) -> Footprint:
    part, config = stage.part, stage.config
    autocast = torch.autocast("cpu", precision.amp or torch.bfloat16, enabled=precision.amp is not None)
    with costs:
        positions = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
        images = _images(config, batch) if part.is_first else None  # alive until the loss is there
        with autocast:
            if part.is_first:
                places = torch.zeros(batch.images * config.tokens_per_tile, dtype=torch.long)
                embeds = stage.front.embed_parts(torch.zeros_like(positions), images, places)
            else:
                width = stage.llm.config.get_text_config().hidden_size
                crossing = torch.float32 if config.llm.train == "full" else precision.frozen_llm
                embeds = torch.empty(batch.rows, batch.tokens, width, dtype=crossing, requires_grad=True)
            front_peak = costs.lap()
            if front_alone:
                return _found(stage, front_peak=front_peak, forward_flops=costs.flops)
            out = hidden_states(stage.llm, embeds, positions, (batch.runs,) * batch.rows, in_place=config.llm.drops_out)
            if part.is_first:
                del embeds  # a later stage's input waits for the gradient that is sent back
            blocks_peak, held, gradient_flops = costs.lap(), costs.now, 0
            if part.is_last:
                chosen, scorer = torch.zeros(batch.supervised, dtype=torch.long), Scorer(stage.llm)
                read = out.flatten(0, 1).index_select(0, chosen)
                if read.requires_grad and scorer.gives_gradient(
                    read, batch.supervised
                ):  # a part of backward that comes with the loss
                    gradient_flops = 2 * batch.supervised * scorer.num_weights
                out = scorer.cross_entropy(read, chosen)
                del read
        forward_flops = costs.flops - gradient_flops
        if out.requires_grad:  # not if there is no image and the projection alone is trained
            out.backward(torch.ones_like(out))
        back_peak = costs.lap()
    return _found(stage, held, front_peak, blocks_peak, back_peak, forward_flops, costs.flops - forward_flops)


def _found(
    stage: Stage,
    held: int = 0,
    front_peak: int = 0,
    blocks_peak: int = 0,
    back_peak: int = 0,
    forward_flops: int = 0,
    backward_flops: int = 0,
) -> Footprint:
    own = {id(p): p for p in stage.parameters()}.values()  # tied ones once
    trained = [p.numel() for p in own if p.requires_grad]
    return Footprint(
        parameters=sum(p.numel() for p in own),
        trained=sum(trained),
        largest_trained=max(trained, default=0),
        weight_bytes=sum(p.nbytes for p in own),
        largest_bytes=max(p.nbytes for p in own),
        held=held,
        front_peak=front_peak,
        blocks_peak=blocks_peak,
        back_peak=back_peak,
        forward_flops=forward_flops,
        backward_flops=backward_flops,
    )


def _images(config: VlmConfig, batch: MicroBatch) -> torch.Tensor | None:
    tower, connector = config.tower, config.connector
    if not batch.images or tower is None or connector is None:
        return None
    if batch.cached:
        return torch.empty(batch.images, *connector.encoded(tower.span(), tower.width()))
    return torch.empty(batch.images, 3, tower.image_size, tower.image_size)
