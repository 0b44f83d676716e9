"""Judging during and after training: validation loss, test accuracy by generated answers, sample prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lavis.config.recipe import Recipe
from lavis.core.dist import World
from lavis.core.paths import resolve
from lavis.core.types import Batch, Conversation, MediaRef, Message
from lavis.data.image import size_of
from lavis.data.loader import eval_batches
from lavis.data.table import PreparedTable
from lavis.eval.answers import Answerer, accuracy, write_answers
from lavis.objectives.base import Task
from lavis.parallel.strategy import Strategy
from lavis.runs.report import SampleReport
from lavis.tokens.template import without_images
from lavis.train.data import RunData

log = logging.getLogger(__name__)


class Evaluator:
    """Everything a run measures beside its training loss."""

    def __init__(self, recipe: Recipe, task: Task, data: RunData, model: nn.Module, world: World, folder: Path) -> None:
        self.run, self.task, self.data, self.model, self.world, self.folder = (
            recipe.run,
            task,
            data,
            model,
            world,
            folder,
        )
        self.answerer = (
            Answerer(model, task.tokenizer, task.template, data.eval_images, world) if task.generates else None
        )
        self.prompts = self._prompts() if task.generates else []
        self.ready: Callable[[Batch], Batch] = lambda batch: batch.to(world.device)

    def follow(self, strategy: Strategy) -> None:
        """Give the model its batches as `strategy` does."""
        self.ready = strategy.ready
        if self.answerer:
            self.answerer.ready, self.answerer.in_step = strategy.ready, strategy.in_step

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over the validation splits (and the parts of a loss that has them)."""
        training = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        count = 0
        for tables in self.data.valid.values():
            for table in tables:
                for batch in eval_batches(
                    table,
                    self.data.eval_images,
                    self.task.template.pad_token_id,
                    self.run.batch_size_eval,
                    self.world.rank,
                    self.world.size,
                ):
                    out = self.model(self.ready(batch))
                    # else this rank had no sample left and only keeps the others company
                    mine = self.task.count(batch) > 0
                    count += out.count if mine else 0
                    for name, value in {"loss": out.loss_sum, **out.parts}.items():
                        sums[name] = sums.get(name, 0.0) + (value.item() if mine else 0.0)
        self.model.train(training)
        names = sorted(sums)
        *totals, n = self.world.sum(*(sums[k] for k in names), count)
        return {name: value / n for name, value in zip(names, totals, strict=True)}

    def test(self, label: str, *, blind: bool = False) -> dict[str, float]:
        """Accuracy on the test splits as `<label>/<split>/accuracy…`; all answers go to answers_<label>.jsonl.

        `blind` takes the images out of the questions. Tasks without answers have none.
        """
        if not self.answerer:
            return {}
        results: dict[str, float] = {}
        for split, tables in self.data.test.items():
            conversations = [_conversation(t, i) for t in tables for i in range(len(t))][: self.run.max_eval_samples]
            if blind:
                conversations = [without_images(c) for c in conversations]
            answers = self.answerer.answer(
                conversations, batch_size=self.run.batch_size_eval, max_new_tokens=self.run.max_new_tokens
            )
            results |= {f"{label}/{split}/{k}": v for k, v in accuracy(answers).items()}
            if self.world.is_main:
                write_answers(self.folder / f"answers_{label}_{split}.jsonl", answers)
        return results

    def sample_prompts(self, step: int) -> None:
        """Answer the fixed prompts and add them to report.html."""
        if not self.answerer or not self.prompts:
            return
        answers = self.answerer.answer(
            self.prompts, batch_size=self.run.batch_size_eval, max_new_tokens=self.run.max_new_tokens
        )
        if self.world.is_main:
            SampleReport(self.folder).add(step, answers)

    def _prompts(self) -> list[Conversation]:
        if self.run.sample_prompts:
            return [_prompt(p.image and str(resolve(p.image)), p.prompt) for p in self.run.sample_prompts]
        tables = next(iter([*self.data.test.values(), *self.data.valid.values()]), [])
        rows = [(t, i) for t in tables for i in range(len(t))]
        # odd: rows often come in pairs of two languages
        stride = max(1, len(rows) // max(1, self.run.num_sample_prompts)) | 1
        return [_conversation(t, i) for t, i in rows[::stride][: self.run.num_sample_prompts]]


def _conversation(table: PreparedTable, index: int) -> Conversation:
    """A conversation of `table` with absolute image paths."""

    def absolute(message: Message) -> Message:
        return replace(
            message,
            parts=tuple(p if isinstance(p, str) else replace(p, path=table.image_path(p.path)) for p in message.parts),
        )

    conversation = table.conversation(index)
    return replace(conversation, messages=tuple(map(absolute, conversation.messages)))


def _prompt(image: str | None, text: str) -> Conversation:
    parts = (MediaRef(image, size_of(image)), f" {text}") if image else (text,)
    return Conversation((Message("user", parts),))
