import pytest
import torch

from lavis.config.recipe import load_recipe
from lavis.core.dist import World
from lavis.data.feature_cache import cache_features
from lavis.data.image import EvalImage
from lavis.data.loader import ImageFolder
from lavis.data.texts import Texts
from lavis.train.data import RunData
from lavis.train.schedules import horizon
from tests.models.conftest import small_model
from tests.train.world import write_recipe

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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["train.max_steps=48"], True),
        (["train.max_steps=3"], False),  # each picture is shown once at most
        (["train.max_steps=48", "data.cache_features_gib=1e-9"], False),
        (["train.max_steps=48", "model.tower.train=full"], False),
        (["train.max_steps=48", "model.media.train_processor=blip2_image_train"], False),
        (["train.max_steps=48", "data.cache_features=false"], False),
        (["train.max_steps=3", "data.cache_features=true"], True),
    ],
)
def test_auto_caches_where_it_can_and_saves_work(cache, tmp_path, monkeypatch, options, expected):
    monkeypatch.setenv("LAVIS_CACHE", str(cache))
    recipe = load_recipe(write_recipe(tmp_path), ["data.cache_features=auto", *options])
    data = RunData(recipe, Texts.of(recipe), ALONE)
    steps = horizon(recipe.optim, recipe.train, data.plan.steps_per_epoch).total_steps
    assert data.caches_features(steps) == expected
