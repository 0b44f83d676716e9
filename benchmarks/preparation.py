"""Time and memory of preparing a LLaVA-like JSON list: python benchmarks/preparation.py [--rows 665000]
[--processes 1 2] [--json FILE]

Rows like those of LLaVA's instruction data (1 to 5 turns, a picture in nine of ten) and a byte-level BPE tokenizer of
32,000 entries are made in a temporary folder. Each start is a process of its own that opens the tokenizer and prepares:
the first start makes the table, the second finds it. Memory is the resident memory of the process and those that it
starts, added up (what they share counts in each), at its largest of ten looks a second. What an image-loading worker
costs is the memory that it has written to and shares with no one; pages of the table that it has read can go any time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROWS = 665_000
LIMITS = {"peak_gib": 2.0, "second_start_seconds": 3.0, "worker_mb": 50.0}
WORDS, VOCABULARY, PICTURES = 20_000, 32_000, 64
CHILD = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from lavis.config.schema import DataEntry, ProcessorConfig
from lavis.core.registries import MEDIA_FORMATS
from lavis.data.image import image_processor
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.tokens.media import MediaSpec
from lavis.tokens.template import ChatTemplate
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
began = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
processor = image_processor(ProcessorConfig(image_size=224))
template = ChatTemplate(tokenizer, MediaSpec(MEDIA_FORMATS.get("llava"), 32, processor), max_length=2048)
source = FileSource(DataEntry(path=str(folder / "rows.json"), images=str(folder / "images")), "data.train.0", "train")
opened = time.perf_counter()
table = prepare(source, template, processes=processes)
ended = time.perf_counter()
found = {"rows": table.report.rows, "kept": len(table), "tokens": int(table.lengths.sum())}
found |= {"prepare_seconds": ended - opened, "tokenizer_seconds": opened - began, "folder": str(table.folder)}
"""
LOAD = """
import psutil, re
from lavis.data.loader import ImageFolder, TrainLoader
from lavis.data.sampler import StepPlan
plan = StepPlan(table.lengths, batch_size=4, accum=2, world_size=1, seed=0, length_grouping=True, pack_length=None,
                dataset_sizes=[len(table)], ratios=None)
loader = TrainLoader([table], plan, ImageFolder(processor), 0, rank=0, num_workers=4, seed=0)
steps = loader.steps(0)
for _ in range(20):
    next(steps)
own = lambda pid: int(re.search(r"Private_Dirty: +(\\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]) * 1024
found["worker_mb"] = max(own(child.pid) for child in psutil.Process().children()) / 1e6
"""


def write_world(folder: Path, rows: int) -> None:
    """Annotations, pictures and a tokenizer."""
    from PIL import Image

    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "on")]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(WORDS)]
    texts = [" ".join(chance.choices(words, k=n)) + "." for n in (8, 12, 20, 60, 90) for _ in range(4000)]
    (folder / "images").mkdir()
    for i in range(PICTURES):
        Image.new("RGB", (64, 48), (i, 2 * i, 3 * i)).save(folder / "images" / f"{i}.jpg")
    with (folder / "rows.json").open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(",\n" if i else "[\n")
            file.write(json.dumps(row(i, chance, texts), indent=2))
        file.write("\n]\n")
    write_tokenizer(folder / "tokenizer", words)


def row(i: int, chance: random.Random, texts: list[str]) -> dict[str, Any]:
    """Row `i`: about as long as those of LLaVA's mix."""
    turns = []
    for turn in range(chance.randint(1, 5)):
        question = chance.choice(texts[:12_000])
        question = f"<image>\n{question}" if not turn and i % 10 else question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": chance.choice(texts)}]
    picture = {"image": f"{chance.randrange(PICTURES)}.jpg"} if i % 10 else {}
    return {"id": f"{i:012}", **picture, "conversations": turns}


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """A chat tokenizer that knows the words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator([f" {word}" for word in words], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|image_pad|>"],
    )
    tokenizer.save_pretrained(folder)


def start(folder: Path, cache: Path, processes: int, then: str = "") -> dict[str, Any]:
    """What a start finds, with its wall time and the largest memory of all of its processes."""
    code = CHILD + then + "print(json.dumps(found))"
    began, peak = time.perf_counter(), 0.0
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(processes)],
        env=os.environ | {"LAVIS_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if then else None,  # PyTorch warns of more workers than cores
        text=True,
    )
    watched = psutil.Process(child.pid)
    while child.poll() is None:
        peak = max(peak, resident(watched))
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"a start failed with exit code {child.returncode}")
    assert child.stdout
    found = json.loads(child.stdout.read().splitlines()[-1])
    return found | {"seconds": time.perf_counter() - began, "peak_gib": peak / 2**30}


def resident(process: psutil.Process) -> float:
    """Bytes of a process and its children, those that end meanwhile left out."""
    total = 0.0
    try:
        everyone = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for one in everyone:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measure(folder: Path, processes: int) -> dict[str, Any]:
    """First and second start, each by so many processes."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        first = start(folder, Path(cache), processes)
        table = Path(first["folder"])
        second = start(folder, Path(cache), processes)
        loading = start(folder, Path(cache), processes, LOAD)
        size = sum(file.stat().st_size for file in table.iterdir())
    return {
        "processes": processes,
        "rows": first["rows"],
        "tokens": first["tokens"],
        "json_mb": (folder / "rows.json").stat().st_size / 1e6,
        "table_mb": size / 1e6,
        "prepare_seconds": first["prepare_seconds"],
        "rows_per_second": first["rows"] / first["prepare_seconds"],
        "peak_gib": first["peak_gib"],
        "second_start_seconds": second["tokenizer_seconds"] + second["prepare_seconds"],
        "second_start_in_all_seconds": second["seconds"],
        "worker_mb": loading["worker_mb"],
    }


def main() -> int:
    """Print the figures; 1 if one passes its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows of the annotations (default {ROWS})")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), args.rows)
        found = [measure(Path(folder), processes) for processes in args.processes]
    print(f"{'':>28}" + "".join(f"{f['processes']:>10} proc." for f in found))
    for name in found[0]:
        limit = f"   (limit {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:>28}" + "".join(f"{f[name]:>16,.2f}" for f in found) + limit)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)
    return int(any(f[name] > limit for f in found for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
