"""Five steps of shapes/align with the pieces of the program put together by hand, then the same five by its runner: the
losses are equal.
"""

import json
import sys
from pathlib import Path

import torch

from lavis.config.recipe import load_recipe
from lavis.core.dist import world
from lavis.data.texts import Texts
from lavis.objectives.learner import Learner
from lavis.objectives.sft import NextToken
from lavis.parallel.strategy import DataParallel, Ranks, whole_model
from lavis.train.data import RunData
from lavis.train.run import run_recipe
from lavis.train.schedules import horizon, learning_rate

STEPS = 5
OPTIONS = [
    f"train.max_steps={STEPS}", "optim.warmup_steps=2", "data.cache_features=false", "eval.before=false",
    "eval.blind=false", "data.test=[]", "data.valid=[]", "log.every=1",
    "log.trackers=[]", "data.train.0.generate.train=300",
]  # fmt: skip


def by_hand() -> list[float]:
    recipe = load_recipe("shapes/align", OPTIONS)  # YAML and options, merged, typed and checked
    torch.manual_seed(recipe.run.seed)  # of the new linear layer
    with world(recipe.run.device) as ranks:  # one process here; under torchrun the same lines see several
        texts = Texts.of(recipe)  # tokenizer and chat template
        data = RunData(recipe, texts, ranks)  # prepared tables, and the plan of which samples make which step
        span = horizon(recipe.optim, recipe.train, data.plan.steps_per_epoch)
        model = whole_model(recipe, texts.tokenizer, ranks.device).to(ranks.device)  # all frozen but llm_proj
        learner = Learner(model, NextToken(), ranks).train()  # the model and the loss it is trained with
        strategy = DataParallel(learner, recipe, Ranks(ranks, ranks), accumulation=data.plan.accum)
        losses: list[float] = []
        for step, batches in enumerate(data.loader.steps(epoch=0)):
            if step == STEPS:
                break
            rate = learning_rate(recipe.optim, span, step)
            # forward and backward of each micro-batch, sum over ranks, clip, update
            result = strategy.step(batches, rate, step + 1)
            losses.append(result.loss)
            tokens, images = sum(b.supervised_tokens for b in batches), sum(len(b.pixel_values) for b in batches)
            print(
                f"step {step + 1}: {len(batches)} micro-batches, {images} images, {tokens} supervised tokens, rate"
                f" {rate:.1e}, loss {result.loss:.6f}"
            )
    return losses


def by_the_runner() -> list[float]:
    recipe = load_recipe("shapes/align", OPTIONS)
    summary = run_recipe(recipe)
    lines = (Path(summary["run_folder"]) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    ours, theirs = by_hand(), by_the_runner()
    print("by hand:      ", *(f"{x:.6f}" for x in ours))
    print("by the runner:", *(f"{x:.6f}" for x in theirs))
    sys.exit(ours != theirs)
