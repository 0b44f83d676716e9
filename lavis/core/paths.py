"""Where files live.

Relative paths in recipes are looked up under the cache folder, then among the parts shipped with the package.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
ASSETS_ROOT = PACKAGE_ROOT / "assets"
"""Small trained parts shipped with the package (the shapes world's frozen models)."""
PROJECTS_ROOT = PACKAGE_ROOT / "projects"
CONFIGS_ROOT = PACKAGE_ROOT / "configs"


def cache_root() -> Path:
    """The folder of weights, data and prepared tables: `$LAVIS_CACHE`, or `cache/` in the working directory."""
    return Path(os.environ.get("LAVIS_CACHE", "cache")).absolute()


def resolve(path: str | os.PathLike[str]) -> Path:
    """An absolute path: as it is if absolute; else the first that exists of cache/`path`, the shipped assets/`path`,
    ./`path`.

    What exists nowhere resolves under the cache folder, so that messages and writers name the place where it belongs.
    """
    p = Path(path).expanduser()
    if p.is_absolute():
        return p
    for root in (cache_root(), ASSETS_ROOT, Path.cwd()):
        if (root / p).exists():
            return root / p
    return cache_root() / p
