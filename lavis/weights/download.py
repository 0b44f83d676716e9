"""Files from the web: resumed where they broke off, checked, and put in place whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import lavis
from lavis.core.errors import DownloadError

CHUNK = 1 << 20
TIMEOUT = 60
"""Seconds without a byte after which a connection counts as broken."""
ATTEMPTS = 5
PAUSE = 2.0
"""Seconds before a broken download is taken up again."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

Show = Callable[[int, int | None], None]
"""Told the bytes that are there and, where it is known, the bytes of the whole."""


def fetch_file(url: str, file: Path, sha256: str | None = None) -> Path:
    """Download `url` to `file`, going on from `<file>.part` if a download was interrupted before.

    The size is checked against the server's, the content against `sha256`; without one, against the server's ETag if
    that is an MD5.
    Raises DownloadError for an address that is not https, an answer other than the file, a full disk, and a download
    that is
    truncated (the part stays, to go on from) or has another hash (it is deleted).
    """
    _check_address(url)
    part, note = (file.with_name(file.name + suffix) for suffix in (".part", ".part.of"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _progress_bar(file.name) as show:
            etag = _fetch_whole(url, part, note, show)
        note.unlink()
        _check_hash(url, part, sha256, etag)
        part.replace(file)
    except OSError as error:
        raise DownloadError(f"{file} can't be written: {error}") from error
    return file


def human_size(size: float) -> str:
    """Bytes in a reader's units: `433 MB`, `2.0 GB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def check_space(size: int, folder: Path, what: str) -> None:
    """Raise DownloadError if `folder` has no room for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(
            f"{what} needs {human_size(size)}, but {folder} has {human_size(free)} free. "
            "Make room, or let $LAVIS_CACHE name a folder on another disk."
        )


def _fetch_whole(url: str, part: Path, note: Path, show: Show) -> str | None:
    """Bring `part` to its full size, over several connections if they break; the server's ETag."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE if attempt else 0)
        with _request(url, part, note) as reply:
            total: int | None = None
            start, version = _start(reply), reply.headers["ETag"] or reply.headers["Last-Modified"]
            if reply.headers["Content-Length"]:
                total = start + int(reply.headers["Content-Length"])
                check_space(total - start, part.parent, url)
            note.write_text(version or "", encoding="utf-8")

            def tell(done: int, total: int | None = total) -> None:
                show(done, total)

            ended = _copy(reply, part, start, tell)
        if ended and total in (None, part.stat().st_size):
            return reply.headers["ETag"]
    raise DownloadError(
        f"{url}: the connection broke off {ATTEMPTS} times, at last at {part.stat().st_size} of {total} bytes. "
        f"The same command goes on from {part}."
    )


def _request(url: str, part: Path, note: Path) -> HTTPResponse:
    """The answer to a request for what `part` lacks, if `note` says which version of the file it is a part of; else for
    all.
    """
    request = Request(url, headers={"User-Agent": f"lavis/{lavis.__version__}", "Accept-Encoding": "identity"})
    version = note.read_text(encoding="utf-8") if note.exists() else ""
    have = part.stat().st_size if part.exists() else 0
    if have and version and not version.startswith("W/"):
        request.add_header("Range", f"bytes={have - 1}-")  # the last byte again: asking for nothing would be an error
        request.add_header("If-Range", version)
    try:
        return build_opener(_CheckedRedirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        raise DownloadError(
            f"{url}: HTTP {error.code} {error.reason}. Check the address, or put the file there by hand."
        ) from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise DownloadError(
            f"{url} can't be reached: {reason}. Check the connection; https_proxy names a proxy."
        ) from error


def _start(reply: HTTPResponse) -> int:
    """Where in the file the body of `reply` begins."""
    return int(re.findall(r"\d+", reply.headers["Content-Range"])[0]) if reply.status == 206 else 0


def _copy(reply: HTTPResponse, part: Path, start: int, show: Callable[[int], None]) -> bool:
    """Write the body from byte `start` of `part` on; False if the connection broke before its end."""
    with part.open("r+b" if start else "wb") as out:
        out.seek(start)
        while True:
            try:
                chunk = reply.read(CHUNK)
            except (OSError, HTTPException):
                return False
            if not chunk:
                break
            out.write(chunk)
            show(out.tell())
        out.flush()
        os.fsync(out.fileno())
    return True


def _check_hash(url: str, part: Path, sha256: str | None, etag: str | None) -> None:
    # Hash-like ETags of other lengths are no hashes of the content everywhere, so only an MD5 counts.
    md5 = re.fullmatch(r'"([0-9a-f]{32})"', etag or "")
    algorithm, wanted = ("sha256", sha256.lower()) if sha256 else ("md5", md5[1] if md5 else None)
    got = _digest(part, algorithm) if wanted else None
    if got != wanted:
        part.unlink()
        raise DownloadError(
            f"{url}: the {algorithm} of what came is {got}, not {wanted}; it was deleted. Try again; "
            "if it stays so, the file at that address is another one than it was."
        )


def _digest(file: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS):
        raise DownloadError(f"{url} is not an https address: files are fetched over https alone.")


class _CheckedRedirects(HTTPRedirectHandler):
    """Follows no redirect away from https."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _progress_bar(name: str) -> Iterator[Show]:
    """A bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(name)
        yield lambda done, total: progress.update(task, completed=done, total=total)
