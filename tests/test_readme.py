"""What the README tells a newcomer to type works as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = {
    line.split("#")[0].strip()
    for name in ("README.md", "README.zh.md")
    for block in re.findall(r"```\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if re.match(r"lavis (configs|data)", line)
}
ORDER = sorted(LINES, key=lambda line: ("my.yaml" in line, "check" in line, line))


def test_both_languages_give_the_same_commands():
    blocks = [
        re.findall(
            r"^(?:\. \.venv|lavis|torchrun|python|make) [^#\n]*|^\. \.venv\S+",
            (ROOT / n).read_text(encoding="utf-8"),
            re.M,
        )
        for n in ("README.md", "README.zh.md")
    ]
    assert [line.strip() for line in blocks[0]] == [line.strip() for line in blocks[1]] and len(blocks[0]) >= 20


# `data show` draws the whole world first
@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] if "data show" in line else []) for line in ORDER]
)
def test_command_runs(line, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "readme"
    folder.mkdir(exist_ok=True)
    arguments = line.removeprefix("lavis ").split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LAVIS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lavis", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "data check" in line:  # the recipe's LLM is not under the test's cache folder, and it says so
        assert done.returncode == 1 and "ckpt/Qwen7B-chat" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_every_path_in_the_tree_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
    for name in re.findall(r"^  (\w+)/ ", text, re.M):
        assert (ROOT / "lavis" / name).is_dir(), name


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_contents_licence_and_origins_are_linked(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "(LICENSE)" in text and "(docs/overview.svg)" in text and "(docs/extending.md)" in text
    for origin in (
        "github.com/Coobiw/MiniGPT4Qwen",
        "github.com/salesforce/LAVIS",
        "arxiv.org/abs/2301.12597",
        "github.com/haotian-liu/LLaVA",
        "github.com/QwenLM/Qwen",
    ):
        assert f"(https://{origin})" in text, origin
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == anchors


def test_every_recipe_that_is_named_is_shipped():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for recipe in re.findall(r"lavis (?:train|plan|weights) ([a-z_]+/\w+)", text):
        assert (ROOT / "lavis" / "projects" / f"{recipe}.yaml").is_file(), recipe
