"""The same recipe gives the same loss and gradient however its global batch of 8 is cut, through the real commands."""

import json

import pytest
import torch
from PIL import Image

from tests.train.world import PICTURES, saved_tensors, train, train_lines, validation_losses

pytestmark = pytest.mark.usefixtures("deepspeed_operators")
STEPS = 5
LAYOUTS = {
    "accumulation": (1, ["train.micro_batch_size=2", "train.accumulation=4"]),
    "data-parallel": (2, ["train.micro_batch_size=4"]),
    "a global batch size": (2, ["train.micro_batch_size=2", "train.global_batch_size=8"]),
    "data-parallel with accumulation": (2, ["train.micro_batch_size=1", "train.accumulation=4"]),
    "cached features": (1, ["train.micro_batch_size=8", "data.cache_features=true"]),
    "workers": (1, ["train.micro_batch_size=8", "run.num_workers=2"]),
}
ZERO = "parallel.deepspeed.zero_optimization"
LAYOUTS |= {
    f"ZeRO-{stage}": (
        2,
        ["train.micro_batch_size=2", "train.accumulation=2", "parallel.strategy=zero", f"{ZERO}.stage={stage}"],
    )
    for stage in range(4)
}
# else so small a model would be whole on each rank
LAYOUTS["ZeRO-3"][1].append(f"{ZERO}.stage3_param_persistence_threshold=1")
LAYOUTS["ZeRO-2, state on the CPU"] = (2, [*LAYOUTS["ZeRO-2"][1], f"{ZERO}.offload_optimizer={{device: cpu}}"])
LAYOUTS["ZeRO-3, all on the CPU"] = (
    2,
    [*LAYOUTS["ZeRO-3"][1], f"{ZERO}.offload_optimizer={{device: cpu}}", f"{ZERO}.offload_param={{device: cpu}}"],
)
LAYOUTS["a budget of tokens"] = (
    2,
    ["train.micro_batch_size=1", "train.accumulation=4", "train.micro_batch_tokens=256"],
)
PIPELINE = ["train.micro_batch_size=2", "parallel.strategy=pipeline"]
LAYOUTS |= {
    "pipeline of 2": (2, [*PIPELINE, "parallel.num_stages=2", "train.accumulation=4"]),
    "pipeline of 2, cut by hand": (
        2,
        [
            *PIPELINE,
            "parallel.num_stages=2",
            "parallel.stage_blocks=[1,3]",
            "train.accumulation=4",
            "data.cache_features=true",
        ],
    ),
    "pipeline of 4": (4, [*PIPELINE, "parallel.num_stages=4", "train.accumulation=4"]),
    "two pipelines of 2": (4, [*PIPELINE, "parallel.num_stages=2", "train.accumulation=2"]),
}
# conversations without images among the others
MIXED = [f"datasets.shapes_text.generate.{key}={n}" for key, n in PICTURES.items()]
SAVED = ["checkpoint.every=1", "checkpoint.keep=9", "run.valid_splits=[val]", "eval.max_new_tokens=2"]


@pytest.fixture(scope="module")
def single(cache, tmp_path_factory):
    return train(cache, tmp_path_factory.mktemp("single"), "train.micro_batch_size=8", *MIXED, *SAVED)


SLOW = {
    "ZeRO-1",
    "pipeline of 2, cut by hand",
    "data-parallel with accumulation",
    "ZeRO-2, state on the CPU",
    "ZeRO-3, all on the CPU",
}
"""Like another one that is always run."""


def some(names, slow):
    """The names as parameters, those of `slow` marked as such."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("layout", some(LAYOUTS, SLOW))
def test_any_layout_equals_a_single_process(cache, tmp_path, single, layout):
    ranks, options = LAYOUTS[layout]
    assert_same_training(single, train(cache, tmp_path, *options, *MIXED, *SAVED, ranks=ranks))


PACKED = ["run.packing=true", "run.pack_length=256"]
PACKED_LAYOUTS = [
    name for name in LAYOUTS if name.startswith(("accumulation", "data-parallel", "ZeRO", "pipeline of", "two"))
]


@pytest.fixture(scope="module")
def single_packed(cache, tmp_path_factory):
    return train(cache, tmp_path_factory.mktemp("packed"), "train.micro_batch_size=8", *PACKED, *MIXED, *SAVED)


@pytest.mark.parametrize("layout", some(PACKED_LAYOUTS, set(PACKED_LAYOUTS) - {"pipeline of 2"}))
def test_any_layout_equals_a_single_process_with_packed_rows(cache, tmp_path, single_packed, layout):
    ranks, options = LAYOUTS[layout]
    assert_same_training(single_packed, train(cache, tmp_path, *options, *PACKED, *MIXED, *SAVED, ranks=ranks))


# ---- pictures in unequal numbers of tiles among documents

TILED = {"media": {"tiling": "tiles", "max_tiles": 3}}


@pytest.fixture(scope="module")
def tiled_data(cache):
    """The `data` section: rows about pictures of four shapes, one of them without a picture, and documents."""
    folder = cache / "tiled"
    folder.mkdir()
    rows = [{"instruction": "Is there a circle?", "output": "no"}]
    for i, size in enumerate([(64, 64), (200, 64), (70, 190), (130, 128)] * 5):
        Image.effect_noise(size, 60 + i).convert("RGB").save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "instruction": f"What is {'x' * i}?", "output": "red circle"})
    (cache / "tiled.json").write_text(json.dumps(rows))
    texts = [" ".join(["red circle"] * (i % 5 + 1)) for i in range(60)]
    (cache / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pictures = {"name": "pictures", "path": "tiled.json", "images": "tiled"}
    documents = {"path": "documents.jsonl", "kind": "document"}
    return {"train": [pictures, documents], "valid": [pictures, documents]}


@pytest.fixture(scope="module")
def single_tiled(cache, tiled_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    return train(cache, folder, "train.micro_batch_size=8", "checkpoint.every=1", "checkpoint.keep=9",
                 model=TILED, data=tiled_data)  # fmt: skip


TILED_LAYOUTS = [*PACKED_LAYOUTS, "cached features", "workers"]


@pytest.mark.parametrize(
    "layout", some(TILED_LAYOUTS, set(TILED_LAYOUTS) - {"data-parallel", "pipeline of 2", "cached features"})
)
def test_any_layout_equals_a_single_process_with_tiles_and_documents(cache, tmp_path, single_tiled, tiled_data, layout):
    ranks, options = LAYOUTS[layout]
    more = ["checkpoint.every=1", "checkpoint.keep=9"]
    run = train(cache, tmp_path, *options, *more, ranks=ranks, model=TILED, data=tiled_data)
    assert_same_training(single_tiled, run)


def assert_same_training(expected, run):
    for want, got in zip(train_lines(expected), train_lines(run), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert validation_losses(run) == pytest.approx(validation_losses(expected), rel=1e-5)
    first = "exp_avg.llm_proj.weight"  # after the first step: the clipped gradient times 1 - beta1
    for step in range(1, STEPS + 1):
        want, got = saved_tensors(expected, step)[first], saved_tensors(run, step)[first]
        assert torch.linalg.norm(got - want) <= 1e-5 * torch.linalg.norm(want)


def test_packed_rows_equal_the_same_samples_padded(cache, tmp_path):
    """One packed row per step holds several samples; padded training on exactly those samples must give the same first
    step.
    """
    from lavis.config.recipe import load_recipe
    from lavis.data.assemble import load_tokenizer, prepare_split
    from lavis.data.sampler import StepPlan
    from tests.train.world import write_recipe

    packed = train(
        cache,
        tmp_path,
        "run.packing=true",
        "run.pack_length=512",
        "train.micro_batch_size=2",
        "train.max_steps=3",
        *SAVED,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIS_CACHE", str(cache))
        recipe = load_recipe(write_recipe(tmp_path))
        (table,) = prepare_split(recipe, "train", load_tokenizer(recipe.model))
        plan = StepPlan(
            table.lengths, batch_size=2, accum=1, world_size=1, seed=42, length_grouping=True, pack_length=512,
            dataset_sizes=[len(table)], ratios=None,
        )  # fmt: skip
        members = [i for row in plan.micro_batches(0, 0, 0)[0] for i in row]
        loss = padded_loss(recipe, [table.sample(i) for i in members])
    assert len(members) > 4
    assert json.loads((packed / "metrics.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(loss, rel=1e-5)


def padded_loss(recipe, samples):
    from lavis.data.assemble import media_processor
    from lavis.data.loader import ImageFolder, collate
    from lavis.data.texts import Texts
    from lavis.objectives.sft import NextToken
    from lavis.parallel.strategy import whole_model

    torch.manual_seed(42)
    texts = Texts.of(recipe)
    model = whole_model(recipe, texts.tokenizer, torch.device("cpu"))
    images = ImageFolder(media_processor(recipe.model, training=True))
    pixels, _ = images.load([p for s in samples for p in s.images], 0)
    batch = collate([[s] for s in samples], pixels, texts.template.pad_token_id, None)
    with torch.no_grad():
        out = NextToken().loss(model.scorer(), model(batch), batch)
    return (out.loss_sum / out.count).item()
