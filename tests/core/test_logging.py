"""Who logs what, and where."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavis.core.logging import LOGGER_NAME, setup_logging, warn_once


@pytest.fixture(autouse=True)
def clean_logger() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def test_rank_0_writes_to_stderr_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(file=tmp_path / "run" / "log.txt")
    logging.getLogger("lavis.train").info("step 1")
    assert "INFO step 1" in capsys.readouterr().err
    assert "INFO step 1" in (tmp_path / "run" / "log.txt").read_text()


def test_other_ranks_write_marked_warnings_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    setup_logging(file=tmp_path / "log.txt")
    logger = logging.getLogger("lavis.train")
    logger.info("step 1")
    logger.warning("bad image")
    warn_once("the same on all ranks")
    err = capsys.readouterr().err
    assert "[rank 3] WARNING bad image" in err
    assert "step 1" not in err and "the same" not in err
    assert not (tmp_path / "log.txt").exists()


def test_setting_up_again_does_not_double_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    logging.getLogger("lavis").info("once")
    assert capsys.readouterr().err.count("once") == 1
