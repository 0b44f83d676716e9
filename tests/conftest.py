"""Settings of all tests: few threads, no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# Two tests side by side have a core each.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from lavis.parallel.deepspeed_setup import build_operators, find_ninja; find_ninja(); build_operators()"

SLOW = ("test_resume", "test_web", "test_demo", "test_equivalence", "test_tutorials", "test_readme", "test_runner")
"""Modules of minutes; they begin first, so that two workers end at the same time."""


def pytest_collection_modifyitems(items):
    """Slow modules first."""
    items.sort(
        key=lambda item: (
            SLOW.index(item.module.__name__.rpartition(".")[2]) if item.module.__name__.endswith(SLOW) else len(SLOW)
        )
    )


@pytest.fixture(scope="session")
def deepspeed_operators(tmp_path_factory):
    """What DeepSpeed compiles on a CPU, compiled by one test process while the others wait."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "deepspeed.lock"):
        subprocess.run(
            [sys.executable, "-c", BUILD],
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            check=True,
        )
