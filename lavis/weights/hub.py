"""Folders from the Hugging Face hub, put in place whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis.core.errors import DownloadError
from lavis.core.paths import resolve
from lavis.weights.download import check_space


def cached_folder(repo: str, patterns: Sequence[str]) -> Path | None:
    """The folder of `repo` in the hub client's own cache, None if what matches `patterns` is not all there.

    Asks no server.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


MODEL_FILES = ("*.json", "*.safetensors"), ("*.json", "pytorch_model*.bin")
"""What is fetched of a model's repository: safetensors, or pickles where it has none."""


def local_folder(name: str) -> Path | None:
    """The folder `name`, or what the hub client has of the repository `name`; None for a file and what is not there."""
    path = resolve(name)
    if path.exists():
        return path if path.is_dir() else None
    if name.count("/") != 1:
        return None
    # a pattern that nothing was fetched for matches what is there, which is nothing
    found = [cached_folder(name, patterns) for patterns in MODEL_FILES]
    return next((folder for folder in found if folder and _has_weights(folder)), found[0])


def fetch_model(name: str) -> Path:
    """The folder of the repository `name` in the hub client's cache, downloaded. Raises DownloadError."""
    for patterns in MODEL_FILES:
        folder = fetch_folder(name, patterns, None)
        if _has_weights(folder):
            return folder
    raise DownloadError(f"{name} on the Hugging Face hub holds no weights: no safetensors and no pytorch_model*.bin.")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def fetch_folder(repo: str, patterns: Sequence[str], folder: Path | None) -> Path:
    """Download the files of `repo` that match `patterns` to `folder`, or to the hub client's cache if that is None.

    A new folder is `<folder>.part` until it is complete; what an interrupted download left is gone on from.
    Raises DownloadError if the hub can't be reached or refuses, the disk is full, or a file has another size than the
    hub says.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    target = folder if folder is None or folder.exists() else folder.with_name(folder.name + ".part")
    # The plan first: without a connection, the download itself would take a half-filled folder for a whole one.
    plan = _snapshot(repo, patterns, target, dry_run=True)
    place = target or Path(HF_HUB_CACHE)
    place.mkdir(parents=True, exist_ok=True)
    check_space(sum(file.file_size or 0 for file in plan if file.will_download), place, repo)
    came = Path(_snapshot(repo, patterns, target, dry_run=False))
    sizes = {f.filename: (came / f.filename).stat().st_size if (came / f.filename).exists() else None for f in plan}
    wrong = [f.filename for f in plan if sizes[f.filename] != f.file_size]
    if wrong or not plan:
        what = (
            f"{', '.join(wrong[:5])} are missing or have the wrong size"
            if wrong
            else f"it has no files {', '.join(patterns)}"
        )
        raise DownloadError(f"{repo} did not come whole into {came}: {what}. Try again.")
    return came.rename(folder) if folder and target != folder else came


def _snapshot(repo: str, patterns: Sequence[str], target: Path | None, *, dry_run: bool) -> Any:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo, local_dir=target, allow_patterns=list(patterns), dry_run=dry_run)
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise DownloadError(
            f"{repo} can't be fetched from the Hugging Face hub: {reason}. Check the name and the connection. "
            "`hf auth login` opens gated models, $HF_ENDPOINT names a mirror, $HF_HUB_OFFLINE must not be set."
        ) from error
