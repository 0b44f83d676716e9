"""What a run leaves to look at: the loss plot, and the sample prompts answered before, during and after training as one
HTML page.
"""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from lavis.data.image import to_rgb
from lavis.eval.answers import Answer
from lavis.runs.metrics import read_metrics

THUMBNAIL = 160
"""Longest side of a picture in the report, pixels."""
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;background:Canvas;
color:CanvasText}
:root{color-scheme:light dark}
table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #8885;padding:.5rem;text-align:left;vertical-align:top}
.yes{color:#188038} .no{color:#c5221f} @media(prefers-color-scheme:dark){.yes{color:#81c995}.no{color:#f28b82}}
img{border-radius:6px;margin-right:4px}
"""


class SampleReport:
    """Answers to the same prompts at several steps, kept in samples.jsonl and shown in report.html."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "samples.jsonl"

    def add(self, step: int, answers: Sequence[Answer]) -> None:
        """Record the answers after `step` optimiser steps and write the page again.

        Earlier records of that step or later, and those of other questions, are dropped.
        """
        asked = [(a.question, list(a.images)) for a in answers]
        rows = [
            r
            for r in self._rows()
            if r["step"] < step and [(a["question"], a["images"]) for a in r["answers"]] == asked
        ]
        rows.append({"step": step, "answers": [asdict(a) for a in answers]})
        temp = self.file.with_suffix(".tmp")
        temp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        temp.replace(self.file)
        (self.folder / "report.html").write_text(self._page(rows), encoding="utf-8")

    def _rows(self) -> list[dict]:
        return (
            [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            if self.file.exists()
            else []
        )

    def _page(self, rows: list[dict]) -> str:
        steps = "".join(f"<th>step {row['step']}</th>" for row in rows)
        body = "".join(
            self._question(
                [Answer(**{**row["answers"][i], "images": tuple(row["answers"][i]["images"])}) for row in rows]
            )
            for i in range(len(rows[0]["answers"]))
        )
        return (
            "<!doctype html><html><head><meta"
            f" charset='utf-8'><title>{html.escape(self.folder.name)}</title><style>{_STYLE}</style>"
            f"</head><body><h1>Sample prompts</h1><p>{html.escape(self.folder.name)}</p>"
            f"<table><tr><th>image</th><th>question</th><th>expected</th>{steps}</tr>{body}</table></body></html>"
        )

    @staticmethod
    def _question(answers: list[Answer]) -> str:
        first = answers[0]
        pictures = "".join(_picture(Path(path)) for path in first.images)
        cells = "".join(f"<td{_verdict(a)}>{html.escape(a.answer)}</td>" for a in answers)
        asked = f"<td>{html.escape(first.question)}</td><td>{html.escape(first.expected)}</td>"
        return f"<tr><td>{pictures}</td>{asked}{cells}</tr>"


def _verdict(answer: Answer) -> str:
    if not answer.expected:
        return ""
    return " class='yes'" if answer.correct else " class='no'"


def _picture(path: Path) -> str:
    return f"<img width='{THUMBNAIL // 2 + 16}' src='{_data_url(path)}' alt='{html.escape(path.name)}'>"


def _data_url(path: Path) -> str:
    try:
        with Image.open(path) as opened:
            image = to_rgb(opened)
    except (OSError, Image.DecompressionBombError):  # the loader took a blank for it too
        image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "lightgrey")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_answers(answers: Sequence[Answer], file: Path, columns: int = 3) -> Path:
    """Draw questions about pictures with their answers as cards in an SVG (the viewer's fonts write the Chinese)."""
    width, height = 290, 150
    rows = -(-len(answers) // columns)
    cards = "".join(_card(a, 10 + (i % columns) * width, 10 + (i // columns) * height) for i, a in enumerate(answers))
    file.write_text(
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{columns * width + 10}' height='{rows * height + 10}'"
        " font-family='system-ui, sans-serif' font-size='13'><rect width='100%' height='100%'"
        f" fill='#f6f8fa'/>{cards}</svg>",
        encoding="utf-8",
    )
    return file


def _card(answer: Answer, x: int, y: int) -> str:
    lines = textwrap.wrap(answer.question, 19 if answer.question.isascii() else 11)
    question = "".join(
        f"<text x='144' y='{28 + 17 * i}' fill='#57606a'>{html.escape(line)}</text>" for i, line in enumerate(lines)
    )
    mark, colour = ("\u2713", "#1a7f37") if answer.correct else (f"\u2717 {answer.expected}", "#cf222e")
    return (
        f"<g transform='translate({x},{y})'><rect width='280' height='140' rx='8' fill='#ffffff'"
        " stroke='#d0d7de'/><image x='6' y='6' width='128' height='128'"
        f" href='{_data_url(Path(answer.images[0]))}'/>{question}<text x='144' y='{46 + 17 * len(lines)}'"
        f" font-size='16' font-weight='600' fill='#1f2328'>{html.escape(answer.answer)}</text><text x='144' y='126'"
        f" fill='{colour}'>{html.escape(mark)}</text></g>"
    )


def plot_loss(folder: Path) -> Path | None:
    """Draw loss.png from metrics.jsonl: training loss, its running mean, validation loss; None if none was logged."""
    train = read_metrics(folder / "metrics.jsonl", "train")
    valid = read_metrics(folder / "metrics.jsonl", "valid")
    if not train:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    ax.plot(steps, losses, color="#9aa0a6", linewidth=0.8, label="training loss")
    ax.plot(steps, _running_mean(losses), color="#1a73e8", label="training loss, running mean")
    if valid:
        ax.plot([r["step"] for r in valid], [r["loss"] for r in valid], "o-", color="#e8710a", label="validation loss")
    ax.set(xlabel="optimiser step", ylabel="loss per supervised token", title=folder.name)
    ax.grid(alpha=0.3)
    ax.legend()
    path = folder / "loss.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def _running_mean(values: list[float], weight: float = 0.9) -> list[float]:
    means: list[float] = []
    mean, norm = 0.0, 0.0
    for v in values:
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        means.append(mean / norm)
    return means
