"""Time to the first token and tokens per second over a conversation: python benchmarks/chat.py [--llm small medium]

A session that keeps keys and values, against reading the whole conversation and its pictures anew at each turn, once
with this program's own generation (as the
original does) and once with stock transformers on the exported model. Random LLMs with the tower of the shapes world;
each turn the three answer the same
question one after the other, so that what else the machine does slows all of them. Medians over repeated conversations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from lavis.config.recipe import load_recipe
from lavis.core.paths import ASSETS_ROOT
from lavis.data.assemble import load_tokenizer
from lavis.export.hf import export_hf
from lavis.export.trained import open_run
from lavis.generation.engine import Engine
from lavis.generation.model import ChatModel
from lavis.generation.pictures import open_picture
from lavis.generation.settings import GenerationSettings
from lavis.generation.whole import generate_whole
from lavis.runs.checkpoint import TrainState, frozen_files, identity, save_checkpoint
from lavis.serve.load import load_chat
from lavis.serve.session import ChatSession

LLMS = {"small": (768, 2048, 12), "medium": (1280, 3456, 14)}
"""Width, width of the MLP, blocks."""
QUESTION = "Which of the shapes in the picture is the largest one, what colour does it have, and where does it stand?"
STOPS = (2,)
SHOWN = (1, 4, 8)
"""Turns that are printed."""


class Clock(BaseStreamer):
    """When tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, if generate was given ids, then with each token."""
        if value.numel() == 1:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def make_run(folder: Path, size: str) -> Path:
    """A run whose LLM is random."""
    width, mlp, blocks = LLMS[size]
    tokenizer = load_tokenizer(load_recipe("shapes/align").model)
    heads = width // 64
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    recipe = load_recipe("shapes/align", [f"model.llm.weights={folder / 'llm'}"])
    tensors = {"llm_proj.weight": 0.1 * torch.randn(width, 128), "llm_proj.bias": torch.zeros(width)}
    frozen = {key: identity(path) for key, path in frozen_files(recipe.model).items()}
    save_checkpoint(folder / "run/checkpoints", TrainState(1, 1, frozen=frozen), tensors, {}, recipe.to_yaml())
    return folder / "run"


def ask_session(session: ChatSession, question: str, pictures: list, tokens: int) -> tuple[list[float], float]:
    """Times of the tokens and when it began."""
    started = time.perf_counter()
    reply = session.ask(question, pictures)
    times: list[float] = []
    given = reply.answer.give

    def give(token: int | None) -> None:
        if token is not None:
            times.append(time.perf_counter())
        given(token)

    vars(reply.answer)["give"] = give
    list(reply)
    return times, started


def ask_anew(chat: ChatModel, prompt: Any, tokens: int) -> tuple[list[float], float]:
    """This program's generation over the whole prompt, pictures encoded again."""
    clock, started = Clock(), time.perf_counter()
    with torch.inference_mode():
        model: Any = chat.model
        embeds = chat.embed(prompt.ids, [model.encode_images(chat.pixels(p))[0] for p in prompt.pictures])
    settings = GenerationSettings(max_new_tokens=tokens)
    length = [len(prompt)]
    generate_whole(chat.llm, embeds, length, STOPS, 0, settings, min_new_tokens=tokens, streamer=clock)
    return clock.times, started


def ask_stock(model, processor, messages: list, tokens: int) -> tuple[list[float], float]:
    """Stock transformers over the whole conversation."""
    clock, started = Clock(), time.perf_counter()
    template = processor.tokenizer.chat_template
    inputs = processor.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    return clock.times, started


def measure(
    folder: Path, size: str, turns: int, tokens: int, repeats: int
) -> dict[str, dict[int, tuple[float, float]]]:
    """Way to turn to (seconds to the first token, tokens per second after it)."""
    run = make_run(folder, size)
    export_hf(open_run(run), folder / "hf")
    chat = load_chat(run=run)
    vars(chat)["stop_token_ids"] = frozenset()  # a random LLM may stop anywhere; here each answer has its full length
    stock, processor = (
        AutoModelForImageTextToText.from_pretrained(folder / "hf", dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(folder / "hf", backend="pil"),
    )
    picture = open_picture(next((ASSETS_ROOT / "shapes/pictures").glob("*.png")))
    seen: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(repeats):
        engine = Engine(chat)
        settings = GenerationSettings(max_new_tokens=tokens, top_k=0)
        session, messages = ChatSession(engine, settings), []
        for turn in range(1, turns + 1):
            shown = [picture] if turn == 1 else []
            messages.append(
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": p.image} for p in shown),
                        {"type": "text", "text": f"{turn}. {QUESTION}"},
                    ],
                }
            )
            prompt = session._prompt(f"{turn}. {QUESTION}", tuple(shown), settings)
            ways = {
                "session": partial(ask_session, session, f"{turn}. {QUESTION}", shown, tokens),
                "everything anew": partial(ask_anew, chat, prompt, tokens),
                "stock transformers": partial(ask_stock, stock, processor, messages, tokens),
            }
            for name, way in ways.items():
                times, started = way()
                seen[name][turn].append((times[0] - started, (len(times) - 1) / (times[-1] - times[0])))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": session.history[-1].answer}]})
        engine.close()
    return {
        name: {
            turn: tuple(statistics.median(column) for column in zip(*rows, strict=True)) for turn, rows in by.items()
        }
        for name, by in seen.items()
    }


def main() -> None:
    """Print the tables and one JSON line for each LLM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", nargs="+", default=["small"], choices=list(LLMS))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    for size in args.llm:
        with tempfile.TemporaryDirectory() as name:
            results = measure(Path(name), size, args.turns, args.tokens, args.repeats)
        base = results["session"]
        print(f"LLM {size} {LLMS[size]}, question of some 45 tokens, answers of {args.tokens}")
        for way, turns in results.items():
            for turn in [t for t in SHOWN if t in turns]:
                first, rate = turns[turn]
                print(
                    f"  {way:20} turn {turn}: first token {first * 1e3:7.1f} ms ({first / base[turn][0]:5.2f} x the"
                    f" session's), {rate:6.1f} tokens/s ({base[turn][1] / rate:.2f} x slower than the session)",
                    flush=True,
                )
        last = max(base)
        print(
            json.dumps(
                {
                    "llm": size,
                    "turn": last,
                    "first_token_faster": {
                        w: round(t[last][0] / base[last][0], 2) for w, t in results.items() if w != "session"
                    },
                    "throughput_ratio": {
                        w: round(base[last][1] / t[last][1], 2) for w, t in results.items() if w != "session"
                    },
                }
            )
        )


if __name__ == "__main__":
    main()
