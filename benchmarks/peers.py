"""Speed and memory of training against the original's recipe and stock transformers: python benchmarks/peers.py
[--samples 144] [--rounds 5] [--only NAME ...] [--tokens] [--json FILE] [--plot FILE]

All train the projection of the same small random model (ViT, Q-Former, Qwen2) on the same samples, in one process on
one core of a Linux machine. A round is an epoch of each of them; they take turns step by step, so that what else the
machine does slows all alike, and a ratio is of two of the same round. A step is from asking for its batch to the
updated weights, its time the processor's. Before that, loss and gradient of all are compared on the same samples.

Memory is measured in a process of its own for each: the largest resident set of an epoch, libraries included, and how
much of it came after building; the tensors alive at the peak of a step; and what autograd keeps for the backward pass,
parameters left out, divided by tokens that are not padding. glibc is told to give memory back at once.

--tokens times steps of 2048 tokens instead: rows of one long sample, and rows of the same tokens as short samples.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import math
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import Blip2ForConditionalGeneration, Trainer, TrainingArguments

from lavis.config.recipe import load_recipe, recipe_from_dict
from lavis.core.dist import World, world
from lavis.core.registries import STRATEGIES
from lavis.core.types import IGNORE_INDEX, Batch, Conversation, Message, Sample
from lavis.data.loader import ImageSource, Pixels, collate, load_batch
from lavis.data.table import PreparedTable
from lavis.models.hf.blip2 import blip2_config
from lavis.models.vlm import Vlm
from lavis.parallel.footprint import CostMode
from lavis.parallel.optim import build_optimizer
from lavis.tokens.training import TokenizerTraining
from lavis.train.run import Job, prepare
from lavis.weights.blip2_names import blip2_tensors

PACKED, LIVE = ["data.packing=true", "train.micro_batch_size=1"], "data.cache_features=false"
OURS: dict[str, list[str]] = {
    "ours, default": [],
    "ours, no feature cache": [LIVE],
    "ours, recompute": ["model.llm.recompute=true"],
    "ours, packing 512": [*PACKED, "data.pack_length=512"],
    "ours, packing 1024": [*PACKED, "data.pack_length=1024"],
    "ours, packing 2048": [*PACKED, "data.pack_length=2048"],
    "ours, no cache, packing 512": [LIVE, *PACKED, "data.pack_length=512"],
}
"""Name to the options of the recipe; a line more is a contender more."""
Done = tuple[int, int]
"""What a step was given: samples, and positions of the LLM."""
ORIGINAL, GROUPED = "original", "trainer, group_by_length"

MICRO_BATCH, MAX_LENGTH, LONGEST = 4, 256, 248
VOCABULARY, TEXT_ONLY = 3168, 0.1
TOKENS_PER_WORD = 1.1
SYSTEM = "You are a helpful assistant. Answer what is asked about the picture."
MODEL: dict[str, Any] = {
    "tower": {"name": "eva_clip_g", "image_size": 112, "embed_dim": 192, "depth": 6, "num_heads": 6},
    "connector": {
        "name": "qformer_linear",
        "qformer": {
            "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768,
            "dropout": 0.0,  # the Trainer puts frozen parts in training mode, too
        },
    },
    "llm": {
        "config": {
            "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 9,
            "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False,
        },
    },
    "max_length": MAX_LENGTH,
}  # fmt: skip
"""About 2.9, 2.1 and 8.9 M parameters; the head's share of the LLM is that of Qwen-7B's."""
TOLERANCE = 1e-4
STEP_TOKENS, PIECE, ROWS = 2048, 64, (128, 256, 512, 1024, 2048)
"""Of --tokens: a piece is a picture and some words, a row has as many as fit."""


# ---- the world


def write_world(folder: Path, samples: int) -> None:
    """Pictures, annotations, tokenizer, random weights and the recipe of all contenders."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "is")]
    vocabulary = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(5000)]
    share = 1 / np.arange(3, 5003)
    words = rng.choice(vocabulary, 60_000, p=share / share.sum()).tolist()
    corpus = [
        Conversation((Message("system", (SYSTEM,)), Message("user", (" ".join(["<Img></Img>", *words[i::100]]),))))
        for i in range(100)
    ]
    learned = recipe_from_dict({"model": {"arch": "byte_level_bpe", "vocab_size": VOCABULARY}})
    tokenizer = TokenizerTraining(learned).fit(corpus)

    def text(tokens: int) -> str:
        return " ".join(rng.choice(words, max(1, round(tokens / TOKENS_PER_WORD))))

    rows = []
    for i in rng.permutation(samples).tolist():  # lengths are the quantiles of a log-normal distribution
        length = min(LONGEST, round(102.5 * math.exp(0.35 * statistics.NormalDist().inv_cdf((i + 0.5) / samples))))
        picture = rng.random() >= TEXT_ONLY
        left = length - (29 + 38 * picture)  # the template's tokens, the picture's with what is around it
        row = {"system": SYSTEM, "instruction": text(left // 4), "output": text(left - left // 4)}
        if picture:
            file = folder / f"{i}.{'jpg' if i % 2 else 'png'}"
            row |= {"image": str(file), "instruction": f"<Img><ImageHere></Img> {row['instruction']}"}
            coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(file)
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))

    torch.manual_seed(0)
    tokenizer.save_pretrained(folder / "llm")
    model: Any = recipe_from_dict({"model": MODEL}).model
    vlm = Vlm.from_config(model, tokenizer)
    vlm.llm_model.save_pretrained(folder / "llm")
    (weights,) = vlm.export(folder, torch.float32, tokenizer)
    for name, part in vlm.parts().items():
        print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
    parts = {"tower": MODEL["tower"] | {"weights": str(weights)}, "llm": {"weights": str(folder / "llm")}}
    parts["connector"] = MODEL["connector"] | {"weights": str(weights)}
    recipe = {
        "model": MODEL | parts,
        "data": {"train": [{"path": str(folder / "rows.json"), "images": str(folder)}], "num_workers": 0},
        "train": {"micro_batch_size": MICRO_BATCH, "epochs": 10},
        "log": {"trackers": []},
        "run": {"output_dir": str(folder / "output"), "device": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


# ---- contenders


class Contender(ABC):
    """A way to train; made from the program's own run of the recipe with `options`."""

    def __init__(self, options: Sequence[str], folder: Path, w: World) -> None:
        recipe = load_recipe(folder / "recipe.yaml", options)
        job = prepare(recipe, STRATEGIES.get(recipe.parallel.strategy), w)
        self.model: Any = job.learner.model
        self.table, self.images, self.optim = job.data.train_tables[0], job.data.train_images, recipe.optim
        self.template: Any = job.texts.template
        self.pad = self.template.pad_token_id
        self.set_up(job, folder)

    @abstractmethod
    def set_up(self, job: Job, folder: Path) -> None:
        """Make what its steps need."""

    @abstractmethod
    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        """The mean over the supervised tokens of these samples."""

    @abstractmethod
    def steps(self, epoch: int) -> Iterator[Done]:
        """An epoch; each `next` loads a batch and takes an optimiser step."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


class Ours(Contender):
    """This program."""

    def set_up(self, job: Job, folder: Path) -> None:
        self.learner, self.loader, self.pack_length = job.learner, job.data.loader, job.data.plan.pack_length
        self.strategy = job.strategy(job.learner, job.recipe, job.ranks, job.data.plan.accum)

    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        samples = [self.table.sample(i) for i in indices]
        if self.pack_length:
            batch = load_batch([samples], self.images, self.pad, max(self.pack_length, sum(map(len, samples))))
        else:
            batch = load_batch([[s] for s in samples], self.images, self.pad)
        out = self.learner(self.learner.ready(batch))
        return out.loss_sum / out.count

    def steps(self, epoch: int) -> Iterator[Done]:
        for batches in self.loader.steps(epoch):
            self.step(batches)
            yield sum(b.num_samples for b in batches), sum(b.input_ids.numel() for b in batches)

    def step(self, batches: list[Batch]) -> None:
        """As the training loop takes one."""
        self.strategy.step(self.learner.objective.before_step(batches, self.learner), self.optim.lr, 1)


class Original(Contender):
    """MiniGPT4Qwen's way with this program's modules: samples in random order, tokenised in the step, each padded to
    max_txt_len, logits and cross-entropy at all positions, activations of the LLM always recomputed.
    """

    def set_up(self, job: Job, folder: Path) -> None:
        self.rows = [self.table.conversation(i) for i in range(len(self.table))]
        self.optimizer = build_optimizer(self.model, self.optim)

    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        rows = [[self.template.encode(self.rows[i])] for i in indices]
        batch = self.model.filler(load_batch(rows, self.images, self.pad, MAX_LENGTH), run_frozen=True)
        mask, embeds = batch.input_ids.ne(self.pad), self.model.embed(batch)
        out = self.model.llm_model(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False)
        logits, targets = out.logits.float()[:, :-1], batch.labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

    def steps(self, epoch: int) -> Iterator[Done]:
        order = np.random.default_rng(epoch).permutation(len(self.rows))
        for indices in order.reshape(-1, MICRO_BATCH).tolist():
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(indices).backward()
            nn.utils.clip_grad_norm_(self.trained(), 1.0)
            self.optimizer.step()
            yield len(indices), len(indices) * MAX_LENGTH


class Stock(Contender):
    """transformers' Trainer and Blip2ForConditionalGeneration on tokenised samples, padded to the longest of the batch.

    Its sampler, loader, loss, clipping and optimiser are called as its own loop calls them; what that does beside
    (callbacks, logging) is left out.
    """

    sampling = "random"

    def set_up(self, job: Job, folder: Path) -> None:
        config = blip2_config(self.model, [self.template.tokenizer.eos_token_id], self.pad)
        tensors = blip2_tensors(self.model.state_dict())
        self.model = Blip2ForConditionalGeneration(config)
        self.model.load_state_dict(tensors)
        self.model.vision_model.post_layernorm.eps = 1e-5  # as LAVIS has it
        self.model.requires_grad_(False).language_projection.requires_grad_(True)
        self.rows = Rows(self.table, self.images)
        args = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=MICRO_BATCH,
            train_sampling_strategy=self.sampling,
            learning_rate=self.optim.lr,
            weight_decay=self.optim.weight_decay,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=True,
            report_to="none",
        )
        self.trainer = Trainer(self.model, args, data_collator=self.collate, train_dataset=self.rows)
        self.loader, self.optimizer = self.trainer.get_train_dataloader(), self.trainer.create_optimizer()

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples padded to the longest. The class can't do without a picture: then a blank one is there."""
        ids, labels = (
            nn.utils.rnn.pad_sequence([torch.tensor(item[key]) for item in items], True, value)
            for key, value in (("input_ids", self.pad), ("labels", IGNORE_INDEX))
        )
        size = self.model.config.vision_config.image_size
        pixels = torch.cat(
            [item["pixel_values"] for item in items if "pixel_values" in item] or [torch.zeros(1, 3, size, size)]
        )
        return {"input_ids": ids, "attention_mask": ids.ne(self.pad).long(), "labels": labels, "pixel_values": pixels}

    def loss(self, indices: Sequence[int]) -> torch.Tensor:
        return self.model(**self.collate([self.rows[i] for i in indices])).loss

    def steps(self, epoch: int) -> Iterator[Done]:
        trainer, batches = self.trainer, iter(self.loader)
        while (taken := trainer.get_batch_samples(batches, 1, torch.device("cpu")))[0]:
            (inputs,), items = taken
            trainer.training_step(self.model, inputs, items)
            trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
            self.optimizer.step()
            self.model.zero_grad()
            yield len(inputs["input_ids"]), inputs["input_ids"].numel()


class StockGrouped(Stock):
    """The same with samples of like length in a batch."""

    sampling = "group_by_length"


class Rows(Dataset[dict[str, Any]]):
    """Tokenised samples with their pictures."""

    def __init__(self, table: PreparedTable, images: ImageSource) -> None:
        self._table, self._images = table, images

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._table.sample(index)
        pixels = self._images.load(sample.images, 0)[0] if sample.images else {}
        return {"input_ids": sample.input_ids, "labels": sample.labels, **pixels}


CONTENDERS: dict[str, Callable[[Path, World], Contender]] = {
    ORIGINAL: partial(Original, ["model.llm.recompute=true", LIVE]),
    "trainer": partial(Stock, [LIVE]),
    GROUPED: partial(StockGrouped, [LIVE]),
    **{name: partial(Ours, options) for name, options in OURS.items()},
}


# ---- what is measured


def describe(table: PreparedTable) -> None:
    """Print what the samples are like."""
    ids = [table.sample(i).input_ids for i in range(len(table))]
    shared = next(n for n, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    print(
        f"{len(table)} samples, {int(table.num_tiles.sum())} with a picture: {table.lengths.mean():.0f} tokens on the"
        f" average, {table.lengths.max()} at most, {table.supervised_tokens.mean():.0f} supervised; the first {shared}"
        " are the same in all"
    )


def compare(contenders: dict[str, Contender]) -> None:
    """Stop if loss or gradient of the same samples differ between contenders."""
    found = {}
    for name, contender in contenders.items():
        (loss := contender.loss(range(MICRO_BATCH))).backward()
        gradients = [p.grad for p in contender.trained() if p.grad is not None]
        found[name] = loss.item(), nn.utils.get_total_norm(gradients).item()
        contender.model.zero_grad(set_to_none=True)
    losses, norms = zip(*found.values(), strict=True)
    worst = max(max(values) - min(values) for values in (losses, norms))
    print(f"loss of {MICRO_BATCH} samples {losses[0]:.5f}, norm of its gradient {norms[0]:.5f}: all within {worst:.1e}")
    if worst > TOLERANCE:
        raise SystemExit(f"the contenders do different work: {found}")


def take_turns(contenders: dict[str, Contender], epoch: int) -> dict[str, tuple[float, float]]:
    """An epoch of each, the one behind the others in samples always next: samples per second, positions per sample."""
    running = {name: contender.steps(epoch) for name, contender in contenders.items()}
    sums = {name: np.zeros(3) for name in contenders}
    while running:
        name = min(running, key=lambda n: sums[n][0])
        started = time.process_time()
        if (done := next(running[name], None)) is None:
            del running[name]
        else:
            sums[name] += (*done, time.process_time() - started)
    return {name: (samples / seconds, positions / samples) for name, (samples, positions, seconds) in sums.items()}


def status(key: str) -> float:
    """A figure of /proc/self/status, MiB."""
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def memory(name: str, folder: Path) -> dict[str, float]:
    """See the module; for a process of its own."""
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
    with world("cpu") as w:
        contender = CONTENDERS[name](folder, w)
        gc.collect()
        weights = {p.untyped_storage().data_ptr(): p.sum() for p in contender.model.parameters()}  # read from the file
        built = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        for _ in contender.steps(0):
            pass
        peak = status("VmHWM")
        kept: dict[int, int] = {}
        kept_bytes = samples = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        costs = CostMode([*contender.model.parameters(), *contender.model.buffers()])
        with costs, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for done in contender.steps(0):
                kept_bytes, samples = kept_bytes + sum(kept.values()), samples + done[0]
                kept.clear()
        return {
            "rss_mib": peak,
            "rss_growth_mib": peak - built,
            "live_mib": costs.lap() / 2**20,
            "kept_bytes_per_token": kept_bytes / samples / contender.table.lengths.mean(),
        }


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, to be called before this one has run a backward pass: a fork
    would not have its threads.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def spread(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def measure_speed(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Samples per second of each, and its ratios to the peers that are there."""
    for contender in contenders.values():
        next(contender.steps(0))  # the first step makes what later ones reuse
    found = [take_turns(contenders, epoch) for epoch in range(1, rounds + 1)]
    rates = {name: [r[name][0] for r in found] for name in contenders}
    result: dict[str, dict[str, Any]] = {}
    for name, rate in rates.items():
        positions = statistics.mean(r[name][1] for r in found)
        result[name] = {"samples_per_s": spread(rate), "rounds": rate, "positions_per_sample": positions}
        for peer in [p for p in (ORIGINAL, GROUPED) if p in rates]:
            result[name][f"to_{peer}"] = spread([a / b for a, b in zip(rate, rates[peer], strict=True)])
    return result


def measure_tokens(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Microseconds per token of steps of STEP_TOKENS tokens, for each of ours."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, ours in contenders.items():
        if not isinstance(ours, Ours):
            continue
        for row in ROWS:
            for kind in ("packed", "single"):
                batch = row_batch(ours, row, packed=kind == "packed")
                steps[f"{name} | {kind} {row}"] = partial(ours.step, [batch])
    times: dict[str, list[float]] = {key: [] for key in steps}
    for number in range(rounds + 1):
        for key, step in steps.items():
            started = time.process_time()
            step()
            if number:
                times[key].append((time.process_time() - started) / STEP_TOKENS * 1e6)
    return {key: {"us_per_token": spread(values), "rounds": values} for key, values in times.items()}


def row_batch(ours: Ours, row: int, *, packed: bool) -> Batch:
    """Rows of `row` tokens: pieces with a picture each, as samples of their own or as one."""
    tower, connector, image = ours.model.config.tower, ours.model.config.connector, ours.model.image_token_id
    span, pieces, draw = connector.span(tower.span()), STEP_TOKENS // PIECE, torch.Generator().manual_seed(0)
    text = tuple(torch.randint(260, 1000, (PIECE - span,), generator=draw).tolist())
    ids, labels = text[:8] + (image,) * span + text[8:], (IGNORE_INDEX,) * (8 + span) + text[8:]
    samples = [Sample(ids * n, labels * n) for n in ([1] * (row // PIECE) if packed else [row // PIECE])]
    features = torch.randn(pieces, *connector.encoded(tower.span(), tower.width()), generator=draw)
    pixels: Pixels = {"features": features, "tiles": (1,) * pieces}
    return collate([samples] * (STEP_TOKENS // row), pixels, ours.pad, row)


# ---- what is shown


def columns_of(result: dict[str, dict[str, Any]]) -> list[str]:
    """The figures that there are."""
    return list(dict.fromkeys(key for found in result.values() for key in found if key != "rounds"))


def show(result: dict[str, dict[str, Any]]) -> None:
    """A line for each contender."""
    lines = [["", *(columns := columns_of(result))]]
    lines += [[name, *(_cell(found.get(column)) for column in columns)] for name, found in result.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        print(name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "{1:.2f} ({0:.2f}-{2:.2f})".format(*value)
    return "" if value is None else f"{value:,.1f}"


def plot(result: dict[str, dict[str, Any]], file: Path) -> None:
    """A panel of bars for each figure, with quartiles where there are any."""
    columns = columns_of(result)
    figure, panels = plt.subplots(1, len(columns), sharey=True, squeeze=False, layout="constrained")
    figure.set_size_inches(2 + 2.6 * len(columns), 1 + 0.3 * len(result))
    for panel, column in zip(panels[0], columns, strict=True):
        for name, found in result.items():
            value = found.get(column, math.nan)
            low, median, high = value if isinstance(value, list) else [value] * 3
            color = "C0" if name.startswith("ours") else "C7"
            panel.barh(name, median, xerr=[[median - low], [high - median]], color=color)
        panel.set_title(column, fontsize=9)
        panel.locator_params(axis="x", nbins=4)
    panels[0][0].invert_yaxis()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Print a table; write it as JSON and as a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=144, help="of an epoch; a multiple of 72 fills packed rows")
    parser.add_argument("--rounds", type=int, default=5, help="0 measures memory alone")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.samples % MICRO_BATCH:
        parser.error(f"--samples must be a multiple of {MICRO_BATCH}")
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    names = [name for name in CONTENDERS if name in args.only and not (args.tokens and name not in OURS)]
    with tempfile.TemporaryDirectory() as temporary, world("cpu") as w:
        folder = Path(temporary)
        os.environ["LAVIS_CACHE"] = str(folder / "cache")
        in_child(write_world, folder, args.samples)  # what it leaves in the heap is no one's
        result: dict[str, dict[str, Any]] = {}
        if args.memory and not args.tokens:
            result = {name: in_child(memory, name, folder) for name in names}
        if args.rounds:
            contenders = {name: CONTENDERS[name](folder, w) for name in names}
            describe(next(iter(contenders.values())).table)
            compare(contenders)
            measured = (measure_tokens if args.tokens else measure_speed)(contenders, args.rounds)
            result = {name: found | result.get(name, {}) for name, found in measured.items()}
    show(result)
    if args.json:
        setting = {"samples": args.samples, "rounds": args.rounds, "torch": torch.__version__}
        args.json.write_text(json.dumps({"setting": setting, "result": result}, indent=1))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
