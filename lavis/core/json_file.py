"""JSON files that come with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavis.core.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError if there is another thing in it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read: {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object. Download it again.")
    return values
