"""The one composition: vision tower, connector, chat LLM; or a chat LLM alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavis.config.init import Init
from lavis.core.errors import ConfigError
from lavis.core.registries import CONNECTORS, MODELS, TOWERS
from lavis.core.types import Batch
from lavis.data.assemble import load_tokenizer
from lavis.models import llm as llms
from lavis.models.adapters import add_lora
from lavis.models.attention import prepare, prepared
from lavis.models.beginning import Beginnings
from lavis.models.composition import Composition
from lavis.models.configs import VlmConfig
from lavis.models.connectors.base import Connector
from lavis.models.initial import initialise, load_initial
from lavis.models.part import Part
from lavis.models.parts import PartConfig
from lavis.models.pretrained import load_model, save_model
from lavis.models.scoring import Scorer
from lavis.models.towers.base import Tower
from lavis.tokens.template import image_token_id
from lavis.weights.tensors import write_tensors


@MODELS.register("vlm")
class Vlm(Composition):
    """An image's vectors stand in the LLM's embedding space at the places of its placeholders.

    Each part is frozen, trained in full, or trained through LoRA adapters, as its section says; what is frozen builds
    no graph and stays in eval mode. `image_token_id` is the id of the placeholder in input_ids, None for text alone.
    Tensors go by the names in lavis.models.composition. Adapters are put on by `add_adapters`, once the weights are
    there. `on_meta` makes parts whose weights a file brings without values, `all_on_meta` every part but the LLM.
    """

    visual_encoder: Tower | None
    connector: Connector | None

    def __init__(
        self,
        config: VlmConfig,
        llm: PreTrainedModel,
        image_token_id: int | None = None,
        *,
        on_meta: bool = False,
        all_on_meta: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.image_token_id = config, image_token_id
        self._span = config.tokens_per_tile
        self._tower_shape = (config.tower.span(), config.tower.width()) if config.tower is not None else (0, 0)
        prepare(llm)
        self._beginnings, self.shares_beginnings = Beginnings(), config.llm.train == "frozen"
        self.visual_encoder = _tower(config, on_meta, all_on_meta)
        self.llm_model = llm
        self.connector = _connector(config, llm, on_meta, all_on_meta)
        for part in self.image_parts():
            part.freeze()
        llm.requires_grad_(config.llm.train == "full")
        if config.llm.recomputes:
            llms.recompute_activations(llm)

    @classmethod
    def from_config(
        cls,
        config: VlmConfig,
        tokenizer: PreTrainedTokenizerFast | None = None,
        device: torch.device | str = "cpu",
        llm_dtype: torch.dtype | Literal["auto"] | None = None,
        init: Sequence[Init] = (),
    ) -> Vlm:
        """The model with the weights its configuration names, in the precision that suits `device` (it stays on the
        CPU).

        llm_dtype: another type of the LLM's weights; `auto` is that of its files. init: what parts start from. Raises
        CheckpointError for a missing or wrong weight file.
        """
        tokenizer = tokenizer or load_tokenizer(config)
        dtype = llm_dtype or (torch.float32 if config.llm.train == "full" else llms.frozen_dtype(device))
        free = _room_beside_tower(config, device) if config.llm.device_map == "auto" else None
        llm = llms.build_llm(config.llm, tokenizer, dtype, free)
        llms.check_context(llm, config.max_length)
        model = cls(config, llm, image_token_id(tokenizer) if config.sees else None, on_meta=True)
        model.load_weights(init)
        model.suit(device)
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", llm_dtype: torch.dtype | None = None
    ) -> Vlm:
        """The model that `save_pretrained` or `lavis export hf` wrote, in eval mode, in the precision that suits
        `device` (it stays on the CPU).

        llm_dtype: another type of the LLM's weights. Raises CheckpointError when the folder holds something else, or
        not all of it.
        """
        model = load_model(cls, folder, llms.frozen_dtype(device), llm_dtype)
        model.suit(device)
        return model

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write the whole model to `folder`: configuration and safetensors files of at most `max_shard_size`.

        `from_pretrained` opens it.
        """
        save_model(self, folder, max_shard_size)

    # -- parts

    def parts(self) -> dict[str, nn.Module]:
        """Name of a part (tower, connector, llm) to its module, of those that are there."""
        found = {"tower": self.visual_encoder, "connector": self.connector, "llm": self.llm_model}
        return {name: part for name, part in found.items() if part is not None}

    def add_adapters(self) -> None:
        """Put on the LoRA adapters that the configuration asks for.

        Once, when the parts have the weights that the adapters are for.
        """
        if self.config.llm.train == "lora":
            add_lora(self.llm_model, self.config.llm.lora, "llm_model.{}".format)
        for part in self.image_parts():
            part.adapt()

    def suit(self, device: torch.device | str) -> None:
        """Give a frozen tower the precision that its section names for a GPU."""
        if torch.device(device).type == "cuda" and self.visual_encoder is not None and self.tower_frozen:
            self.visual_encoder.cast_frozen(llms.DTYPES[self.visual_encoder.config.precision])

    def load_weights(self, init: Sequence[Init] = ()) -> set[str]:
        """Fill the tower and the connector from the files of their sections, put on the adapters, and load what `init`
        names over them. Afterwards nothing is on the meta device.

        Returns the public names of what came from files. Raises CheckpointError for a missing or wrong file.
        """
        filled = {name for part in self.image_parts() for name in _load(part)}
        if self.config.llm.weights:
            filled |= {name for name in self.state_dict() if name.startswith("llm_model.")}
        self.add_adapters()
        for item in init:
            filled |= set(load_initial(self.state_dict(), item, self.visual_encoder, filled).loaded)
        return filled

    @property
    def tower_frozen(self) -> bool:
        """Whether what `encode_images` gives can never change (so that it may be cached)."""
        if self.visual_encoder is None or self.connector is None:
            return True
        return not self.visual_encoder.trained and self.connector.encoder_frozen

    @property
    def llm_trained(self) -> bool:
        """Whether any tensor of the LLM is trained."""
        return any(p.requires_grad for p in self.llm_model.parameters())

    def borrowed_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter of a part of it) where a forward reads a weight itself instead of calling the part: what
        splits weights over ranks must know.
        """
        return [pair for part in self.image_parts() for pair in part.borrowed_parameters()]

    def unhooked_parameters(self) -> list[nn.Parameter]:
        """Parameters used outside a call of the module that owns them: what splits weights over ranks must know."""
        return [p for part in self.image_parts() for p in part.unhooked_parameters()]

    def image_parts(self) -> list[Tower | Connector]:
        """Tower and connector, where there are any."""
        return [part for part in (self.visual_encoder, self.connector) if part is not None]

    def rate_scales(self, layer_decay: float) -> dict[nn.Parameter, float]:
        """Parameter of the LLM to the factor on its learning rate; the other parts say it themselves."""
        return dict.fromkeys(self.llm_model.parameters(), self.config.llm.lr_scale)

    def train(self, mode: bool = True) -> Vlm:
        """As nn.Module.train, but frozen parts stay in eval mode; a frozen LLM unless its activations are recomputed,
        which needs train mode.
        """
        super().train(mode)
        self.llm_model.train(mode and (self.llm_trained or self.config.llm.recomputes))
        return self

    def place_llm(self, device_map: str, device: torch.device | str) -> None:
        """Leave the LLM on the CPU (`cpu`), or spread it over the devices that are there (`auto`), with room for the
        tower on `device`.

        `.to(device)` moves the other parts alone from now on.
        """
        self.config = replace(self.config, llm=replace(self.config.llm, device_map=device_map))
        if device_map == "auto":
            llms.spread(self.llm_model, _room_beside_tower(self.config, device))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Vlm:
        """What `.to(device)` does, but an LLM that `device_map` has placed stays where it is."""
        if self.config.llm.device_map is None:
            return super()._apply(fn, recurse)
        place = list(self._modules)
        llm = self._modules.pop("llm_model")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules["llm_model"] = llm
            for name in place:  # their order is that of parameters
                self._modules[name] = self._modules.pop(name)

    # -- forward

    def encode_images(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """The vectors an image (or tile) becomes, as far as they may be stored: [N, 3, S, S] -> [N, Q, D_enc]."""
        assert self.visual_encoder is not None and self.connector is not None
        with torch.no_grad() if self.tower_frozen else contextlib.nullcontext():
            vectors = self.visual_encoder.encode(pixels_NCHW)
            _check_vectors("tower", self.config.tower, vectors, self._tower_shape)
            return self._recomputed(self.connector.encode, vectors)

    def _recomputed(self, step: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """`step` of the connector, which keeps nothing but its inputs where its section says so."""
        if self.training and self.config.connector is not None and self.config.connector.recompute:
            return checkpoint(step, inputs, use_reentrant=False)
        return step(inputs)

    def encoder_tensors(self) -> dict[str, torch.Tensor]:
        """What `encode_images` uses, by public name."""
        prefixes = ("visual_encoder.", *(self.connector.encoder_prefixes if self.connector is not None else ()))
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(prefixes)}

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input embeddings [B, L, D]: the LLM's own, with each placeholder replaced by an image's vector."""
        images = batch.pixel_values if batch.features is None else batch.features
        return self.embed_parts(batch.input_ids, images, batch.known.placeholders)

    def embed_parts(
        self, input_ids: torch.Tensor, images: torch.Tensor | None, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `embed`; images: pixel_values [N, 3, S, S] or features [N, Q, D_enc] of the ids' placeholders, in reading
        order. where: the placeholders among all B * L positions; they are looked for if it is not given.
        """
        table: Any = self.llm_model.get_input_embeddings()
        ids = input_ids.to(table.weight.device)
        if self.connector is None or self.image_token_id is None:
            return table(ids)
        places = torch.eq(ids, self.image_token_id)
        # a placeholder that was added to the tokenizer has no row of its own
        embeds = table(ids.masked_fill(places, 0))
        if images is None:
            return embeds
        encoded = self.encode_images(images) if images.ndim == 4 else images
        vectors = self._recomputed(self.connector.project, encoded)
        # else one picture's vectors could stand in the places of another
        _check_vectors("connector", self.config.connector, vectors, (self._span, embeds.shape[-1]))
        at = places.flatten().nonzero().squeeze(1) if where is None else where.to(embeds.device)
        # a filler has vectors and no place
        return embeds.flatten(0, 1).index_copy(0, at, vectors.flatten(0, 1)[: len(at)].to(embeds)).view_as(embeds)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The LLM's last hidden states [B, L, D], behind its final norm."""
        llm, shared, known = self.llm_model, None, batch.known
        if self.shares_beginnings and known.beginning and prepared(llm):
            shared = self._beginnings.of(llm, known.beginning)
        in_place = self.config.llm.drops_out
        return llms.hidden_states(llm, self.embed(batch), batch.position_ids, known.runs, shared, in_place=in_place)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.hidden(batch)

    def scorer(self, calls: Callable[[int], int] | None = None) -> Scorer:
        """The LLM's head; `calls`: see Scorer."""
        return Scorer(self.llm_model, calls)

    def filler(self, batch: Batch, *, run_frozen: bool = False) -> Batch:
        """`batch` such that every trained part takes part, with no effect on what comes out: one without images is
        given vectors or an image that have no place in it.

        run_frozen: a frozen tower takes part too.
        """
        c, device = self.config, batch.input_ids.device
        if c.tower is None or c.connector is None or batch.pixel_values is not None or batch.features is not None:
            return batch
        if run_frozen or not self.tower_frozen:
            return replace(batch, pixel_values=torch.zeros(1, 3, c.tower.image_size, c.tower.image_size, device=device))
        shape = c.connector.encoded(c.tower.span(), c.tower.width())
        return replace(batch, features=torch.empty(0, *shape, device=device))

    def export(self, folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
        """What later recipes load: `tower.safetensors`, all but the LLM; or of text alone a Hugging Face folder."""
        if self.visual_encoder is not None:
            tensors = {k: v for k, v in self.state_dict().items() if not k.startswith("llm_model.")}
            return [write_tensors(tensors, folder / "tower.safetensors", dtype)]
        folder.mkdir(parents=True, exist_ok=True)
        llm: Any = self.llm_model  # transformers declares `to` without a signature
        llm.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return [folder]


def _check_vectors(part: str, config: PartConfig | None, vectors: torch.Tensor, shape: tuple[int, int]) -> None:
    """Raise ConfigError if a part does not give what its section says; preparation relied on that."""
    if vectors.shape[1:] != shape:
        gives, says = " x ".join(map(str, vectors.shape[1:])), " x ".join(map(str, shape))
        raise ConfigError(
            f"model.{part} {getattr(config, 'name', '')}: it gives {gives} (vectors of a picture x width) where {says}"
            " follow from span() and width() of its section. Correct these, or what it gives."
        )


def _load(part: Part) -> tuple[str, ...]:
    """Public names of what the weight file of a part, if it has one, brought."""
    report = part.load(part.config.weights) if part.config.weights else None
    part.complete()
    if report is None:
        return ()
    initialise(part)
    return report.loaded


def _tower(config: VlmConfig, on_meta: bool, always: bool) -> Tower | None:
    if config.tower is None:
        return None
    with _made(always or (on_meta and config.tower.weights is not None)):
        return TOWERS.get(config.tower.name).from_config(config.tower)


def _connector(config: VlmConfig, llm: PreTrainedModel, on_meta: bool, always: bool) -> Connector | None:
    if config.connector is None or config.tower is None:
        return None
    table: Any = llm.get_input_embeddings()
    width = table.weight.shape[1]
    with _made(always or (on_meta and config.connector.weights is not None)):
        return CONNECTORS.get(config.connector.name).from_config(config.connector, config.tower.width(), width)


def _made(on_meta: bool) -> contextlib.AbstractContextManager[Any]:
    """No time and memory for values that a file brings."""
    return torch.device("meta") if on_meta else contextlib.nullcontext()


def _room_beside_tower(config: VlmConfig, device: torch.device | str) -> dict[int | str, int]:
    """What the LLM may take of each device when the tower is on `device`."""
    return llms.free_memory(image_parts_bytes(config), torch.device(device).index or 0)


def image_parts_bytes(config: VlmConfig) -> int:
    """Memory that the frozen tower's weights take on a GPU, the connector's with them, and 1 GiB for what they compute;
    0 for text alone.
    """
    if config.tower is None or config.connector is None:
        return 0
    with torch.device("meta"):
        tower = TOWERS.get(config.tower.name).from_config(config.tower)
        connector = CONNECTORS.get(config.connector.name).from_config(config.connector, config.tower.width(), 1)
    tower.cast_frozen(llms.DTYPES[config.tower.precision])
    return sum(p.nbytes for part in (tower, connector) for p in part.parameters()) + (1 << 30)
