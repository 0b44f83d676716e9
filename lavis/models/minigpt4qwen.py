"""The name that the original, and folders of older versions, have for a Vlm."""

from __future__ import annotations

from lavis.models.vlm import Vlm

MiniGPT4Qwen = Vlm
