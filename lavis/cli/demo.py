"""`lavis demo`: a frozen LLM learns to see through one linear layer, on a CPU, in minutes."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis.eval.answers import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lavis demo`."""
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that override the two recipes, shapes/align and shapes/evaluate_tower",
    )
    parser.add_argument("--questions", type=int, default=8, help="answered questions shown at the end")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, show, and print one JSON object as the last line."""
    started = time.perf_counter()
    from lavis.config.recipe import load_recipe
    from lavis.core.logging import setup_logging
    from lavis.runs.report import draw_answers
    from lavis.train.run import run_recipe

    setup_logging()
    align, tower = load_recipe("shapes/align", args.options), load_recipe("shapes/evaluate_tower", args.options)
    print("The vision tower with the LLM it was trained with:", flush=True)
    with_own_llm = run_recipe(tower)["results"]["test/test/accuracy"]
    print("\nThe same tower before an LLM it has never met; only the linear layer between them is trained:", flush=True)
    summary = run_recipe(align)
    folder = Path(summary["run_folder"])
    results = summary["results"]
    picked = _pick(folder / "answers_test_test.jsonl", args.questions)
    picture = draw_answers(picked, folder / "answers.svg")
    _show_answers(picked)
    _show_table(results, with_own_llm)
    print(f"\nLook at {folder / 'report.html'} (answers before, during, after), {picture} and {folder / 'loss.png'}.")
    print(f"Talk with the result: lavis chat --run {shlex.quote(str(folder))}")
    figures = {
        "held_out_accuracy": results["test/test/accuracy"],
        "blind_accuracy": results["blind/test/accuracy"],
        "accuracy_before": results["before/test/accuracy"],
        "accuracy_with_own_llm": with_own_llm,
        "trainable_parameters": summary["trainable_parameters"],
        "total_parameters": summary["total_parameters"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}))
    return 0


def _pick(file: Path, most: int) -> list[Answer]:
    """Answers spread evenly over the file, half in each language, as they came out."""
    from lavis.eval.answers import read_answers

    picked: list[Answer] = []
    for lang in ("en", "zh"):
        answers = [a for a in read_answers(file) if a.lang == lang]
        picked += answers[:: max(1, len(answers) // max(1, most // 2))][: most // 2]
    return picked


def _show_answers(answers: list[Answer]) -> None:
    print("\nHeld-out pictures:")
    for a in answers:
        mark = "right" if a.correct else f"wrong, {a.expected}"
        print(f"  {Path(a.images[0]).name}  {a.question}  ->  {a.answer}  ({mark})")


def _show_table(results: dict[str, Any], with_own_llm: float) -> None:
    print(f"\n{'accuracy on held-out pictures':34}{'before':>9}{'after':>9}{'blind':>9}")
    prefix = "test/test/accuracy"
    for key in sorted(k for k in results if k.startswith(prefix)):
        rest = key.removeprefix(prefix)
        columns = [results[f"{label}/test/accuracy{rest}"] for label in ("before", "test", "blind")]
        print(f"  {rest.lstrip('/') or 'all':32}" + "".join(f"{100 * v:8.1f}%" for v in columns))
    print(f"  {'tower with its own LLM':32}{'':9}{100 * with_own_llm:8.1f}%")
