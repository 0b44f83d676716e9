"""The process group's environment."""

from __future__ import annotations

import pytest

from lavis.core.dist import world
from lavis.core.errors import ConfigError


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="torchrun"), world("cpu"):
        pass
