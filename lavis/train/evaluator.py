"""Judging during and after training: validation loss, metrics of generated answers, sample prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lavis.config.recipe import Recipe
from lavis.core.paths import resolve
from lavis.core.registries import METRICS
from lavis.core.types import Batch, Conversation, MediaRef, Message
from lavis.data.image import size_of
from lavis.data.loader import eval_batches
from lavis.data.table import PreparedTable
from lavis.data.texts import Texts
from lavis.eval.answers import Answerer, write_answers
from lavis.eval.metrics import Metric, judged
from lavis.objectives.learner import Learner
from lavis.runs.report import SampleReport
from lavis.tokens.template import without_images
from lavis.train.data import RunData


class Evaluator:
    """Everything a run measures beside its training loss."""

    def __init__(
        self,
        recipe: Recipe,
        texts: Texts,
        data: RunData,
        learner: Learner,
        folder: Path,
    ) -> None:
        self.recipe, self.data, self.learner, self.folder = recipe, data, learner, folder
        self.pad_token_id, self.world = texts.template.pad_token_id, learner.world
        answers = learner.objective.generates
        self.answerer = Answerer(learner, texts, data.eval_images) if answers else None
        self.metrics: list[Metric] = [METRICS.get(name)() for name in recipe.eval.metrics]
        self.prompts = self._prompts() if answers else []

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss over the validation splits (and the parts of a loss that has them)."""
        training = self.learner.training
        self.learner.eval()
        sums = dict.fromkeys(("loss", *self.learner.objective.parts), 0.0)
        count = 0
        for batch in self._valid_batches():
            out = self.learner(self.learner.ready(batch))
            if self.learner.objective.units(batch) == 0:
                continue  # this rank had no sample left and only keeps the others company
            count += out.count
            for name, value in {"loss": out.loss_sum, **out.parts}.items():
                sums[name] += value.item()
        self.learner.train(training)
        names = sorted(sums)
        *totals, n = self.world.sum(*(sums[k] for k in names), count)
        return {name: value / n for name, value in zip(names, totals, strict=True)}

    def _valid_batches(self) -> Iterator[Batch]:
        size, rank, ranks = self.recipe.eval.batch_size, self.world.rank, self.world.size
        for tables in self.data.valid.values():
            for table in tables:
                yield from eval_batches(table, self.data.eval_images, self.pad_token_id, size, rank, ranks)

    def test(self, label: str, *, blind: bool = False) -> dict[str, float]:
        """The metrics of the test splits' answers as `<label>/<split>/<metric>…`; answers go to answers_<label>.jsonl.

        `blind` takes the images out of the questions. Objectives without answers have none.
        """
        if not self.answerer:
            return {}
        results: dict[str, float] = {}
        for split, tables in self.data.test.items():
            conversations = [_conversation(t, i) for t in tables for i in range(len(t))][: self.recipe.eval.max_samples]
            if blind:
                conversations = [without_images(c) for c in conversations]
            answers = self.answerer.answer(
                conversations, batch_size=self.recipe.eval.batch_size, max_new_tokens=self.recipe.eval.max_new_tokens
            )
            if self.world.is_main:
                write_answers(self.folder / f"answers_{label}_{split}.jsonl", answers)
            for metric in self.metrics:
                results |= {f"{label}/{split}/{k}": v for k, v in judged(metric, answers).items()}
        return results

    def sample_prompts(self, step: int) -> None:
        """Answer the fixed prompts and add them to report.html."""
        if not self.answerer or not self.prompts:
            return
        answers = self.answerer.answer(
            self.prompts, batch_size=self.recipe.eval.batch_size, max_new_tokens=self.recipe.eval.max_new_tokens
        )
        if self.world.is_main:
            SampleReport(self.folder).add(step, answers)

    def _prompts(self) -> list[Conversation]:
        if self.recipe.eval.prompts:
            return [_prompt(p.image and str(resolve(p.image)), p.prompt) for p in self.recipe.eval.prompts]
        tables = next(iter([*self.data.test.values(), *self.data.valid.values()]), [])
        rows = [(t, i) for t in tables if t.holds_conversations for i in range(len(t))]
        # odd: rows often come in pairs of two languages
        stride = max(1, len(rows) // max(1, self.recipe.eval.num_prompts)) | 1
        return [_conversation(t, i) for t, i in rows[::stride][: self.recipe.eval.num_prompts]]


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
