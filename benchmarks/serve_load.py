"""Many clients at once against `lavis serve` on the shapes model: python benchmarks/serve_load.py [--clients 32]
[--seconds 120]

Each client has a picture of its own and asks about it over and over, in conversations of up to four turns, streaming
and not. What it should get was asked
beforehand by one client alone. Prints answers per second, errors, answers that are another's, latencies, and the
server's memory over time.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from lavis.data.shapes.scene import render, sample_scene

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("What is in the picture?", "图里有什么？", "How many shapes are there?", "Is there a red circle?")


def data_url(seed: int) -> str:
    """A picture of the shapes world."""
    buffer = io.BytesIO()
    render(sample_scene(f"load/{seed}")).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(client: httpx.Client, messages: list, stream: bool) -> tuple[str, float, float]:
    """(answer, seconds to the first text, seconds in all)."""
    started = time.perf_counter()
    if not stream:
        response = client.post("/v1/chat/completions", json={"messages": messages})
        response.raise_for_status()
        seconds = time.perf_counter() - started
        return response.json()["choices"][0]["message"]["content"], seconds, seconds
    text, first = "", 0.0
    with client.stream("POST", "/v1/chat/completions", json={"messages": messages, "stream": True}) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                first = first or (time.perf_counter() - started) * bool(piece)
                text += piece
    return text, first, time.perf_counter() - started


def talk(client: httpx.Client, url: str, turns: int, stream: bool) -> tuple[list[str], list[tuple[float, float]]]:
    """The answers of a conversation about the picture at `url`, and their latencies."""
    messages: list[dict[str, Any]] = []
    answers, latencies = [], []
    for question in QUESTIONS[:turns]:
        image = [] if messages else [{"type": "image_url", "image_url": {"url": url}}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        answer, first, whole = ask(client, messages, stream)
        messages.append({"role": "assistant", "content": answer})
        answers.append(answer)
        latencies.append((first, whole))
    return answers, latencies


class Clients:
    """Threads that ask until the time is over."""

    def __init__(self, base: str, expected: dict[str, list[str]], seconds: float) -> None:
        self.base, self.expected, self.until = base, expected, time.perf_counter() + seconds
        self.latencies: list[tuple[float, float]] = []
        self.errors: list[str] = []
        self.wrong: list[tuple[list[str], list[str]]] = []

    def run(self, number: int, url: str) -> None:
        """One client."""
        rng = random.Random(number)
        with httpx.Client(base_url=self.base, timeout=120) as client:
            while time.perf_counter() < self.until:
                try:
                    answers, latencies = talk(client, url, rng.randint(1, 4), rng.random() < 0.5)
                except httpx.HTTPError as error:
                    self.errors.append(repr(error))
                    continue
                self.latencies += latencies
                if answers != self.expected[url][: len(answers)]:
                    self.wrong.append((answers, self.expected[url]))


def main() -> int:
    """Print the figures; 1 if an answer failed or was another's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "lavis", "serve", "--model-type", "shapes", "--port", str(port)]
    server = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{base}/health")
                break
            except httpx.TransportError:
                time.sleep(0.3)
        urls = [data_url(seed) for seed in range(args.clients)]
        with httpx.Client(base_url=base, timeout=120) as client:
            expected = {url: talk(client, url, len(QUESTIONS), False)[0] for url in urls}
        print(
            f"{args.clients} pictures, {len({tuple(a) for a in expected.values()})} different sets of answers",
            flush=True,
        )
        clients, process, memory = Clients(base, expected, args.seconds), psutil.Process(server.pid), []
        threads = [threading.Thread(target=clients.run, args=(i, url)) for i, url in enumerate(urls)]
        for thread in threads:
            thread.start()
        for _ in itertools.takewhile(lambda _: any(t.is_alive() for t in threads), itertools.count()):
            memory.append(process.memory_info().rss)
            time.sleep(args.seconds / 12)
        healthy = httpx.get(f"{base}/health").status_code == 200
    finally:
        server.terminate()
        server.wait()
    first, whole = (sorted(column) for column in zip(*clients.latencies, strict=True))
    print("server memory, MiB: " + " ".join(f"{m / 2**20:.0f}" for m in memory))
    figures = {
        "clients": args.clients,
        "answers": len(whole),
        "answers_per_second": round(len(whole) / args.seconds, 1),
        "errors": len(clients.errors),
        "answers_of_others": len(clients.wrong),
        "first_text_seconds_median": round(statistics.median(first), 3),
        "answer_seconds_median": round(statistics.median(whole), 3),
        "answer_seconds_p99": round(whole[int(0.99 * (len(whole) - 1))], 3),
        "memory_growth": round(memory[-1] / memory[len(memory) // 4] - 1, 3),
        "healthy_after": healthy,
    }
    print("\n".join(map(str, [*clients.errors[:3], *clients.wrong[:3]])))
    print(json.dumps(figures))
    return int(bool(clients.errors or clients.wrong or not healthy))


if __name__ == "__main__":
    sys.exit(main())
