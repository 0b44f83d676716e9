import torch

from lavis.core.dist import World
from lavis.data.feature_cache import cache_features
from lavis.data.image import EvalImage
from lavis.data.loader import ImageFolder
from tests.models.conftest import small_model

ALONE = World(0, 0, 1, torch.device("cpu"))


def pictures(folder, colours):
    from PIL import Image

    paths = []
    for i, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
        paths.append(str(folder / f"{i}.png"))
    return paths


def test_cached_features_are_the_towers_own_and_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path / "cache"))
    model, images = small_model(), ImageFolder(EvalImage(32))
    paths = pictures(tmp_path, ["red", "blue", "white"])
    cached = cache_features(model, paths * 2, images, "eval", ALONE)
    order = [paths[2], paths[0], paths[2]]
    expected = model.encode_images(images.load(order, 0)[0]["pixel_values"])
    torch.testing.assert_close(cached.load(order, 0)[0]["features"], expected, rtol=1e-5, atol=1e-5)
    made = cached.file.stat().st_mtime_ns
    assert cache_features(model, paths, images, "eval", ALONE).file.stat().st_mtime_ns == made


def test_a_changed_tower_picture_or_processor_is_encoded_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path / "cache"))
    model, images = small_model(), ImageFolder(EvalImage(32))
    paths = pictures(tmp_path, ["red", "blue"])
    files = [cache_features(model, paths, images, "eval", ALONE).file]
    files.append(cache_features(model, paths, images, "another size", ALONE).file)
    pictures(tmp_path, ["red", "green"])
    files.append(cache_features(model, paths, images, "eval", ALONE).file)
    model.connector.llm_proj.weight.data += 1  # what is behind the tower does not matter
    assert cache_features(model, paths, images, "eval", ALONE).file == files[-1]
    model.connector.ln_vision.bias.data += 1
    files.append(cache_features(model, paths, images, "eval", ALONE).file)
    assert len(set(files)) == 4
