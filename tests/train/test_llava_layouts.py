"""A vision model of transformers with adapters, a trained connector and an LLM with adapters, in every layout."""

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from tests.train.test_equivalence import LAYOUTS, MIXED, some
from tests.train.world import PICTURES, RUN, launch, only_run, train_lines

pytestmark = pytest.mark.usefixtures("deepspeed_operators")
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
LORA = {"train": "lora", "lora": {"rank": 2, "dropout": 0.0}}
MODELS = {
    "LLaVA": ({"name": "clip", "weights": "tiny/clip", **LORA}, {"name": "mlp"}),
    # positions that are resized at every call, and queries of the connector's own
    "SigLIP2 and a resampler": (
        {"name": "siglip2", "weights": "tiny/siglip2", "train": "full"},
        {"name": "resampler", "queries": 5, "depth": 1, "width": 16, "heads": 2},
    ),
}
PACKED = ["data.packing=true", "data.pack_length=256"]
CHOSEN = ["accumulation", "data-parallel", "ZeRO-2", "ZeRO-3", "pipeline of 2", "pipeline of 4", "two pipelines of 2"]


@pytest.fixture(scope="module")
def towers(cache):
    """The cache with a CLIP and a SigLIP2 as they lie on the hub."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    square = {**VISION, "image_size": 64, "patch_size": 16}
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=square, text_config=TEXT | ids))
    clip.save_pretrained(cache / "tiny/clip")
    patches = {**VISION, "num_patches": 9, "patch_size": 16}  # 3 x 3 positions for 4 x 4 patches
    config = transformers.Siglip2Config(vision_config=patches, text_config=TEXT | ids)
    transformers.Siglip2Model(config).save_pretrained(cache / "tiny/siglip2")
    return cache


def trained(cache, folder, name, *options, ranks=1):
    """The run of the model `name` of MODELS, a global batch of 8, in `folder`."""
    tower, connector = MODELS[name]
    recipe = folder / "recipe.yaml"
    sections = {
        "model": {
            "tower": tower | {"image_size": 64},
            "connector": connector,
            "llm": {"weights": "tiny/llm", **LORA},
            "media": {"format": "llava", "resize": "pad"},
            "max_length": 200,
        },
        "datasets": {"shapes_instruction": {"generate": PICTURES}},
        "run": RUN | {"num_sample_prompts": 0},
    }
    recipe.write_text(yaml.safe_dump(sections))
    done = launch(cache, recipe, *options, *MIXED, ranks=ranks)
    assert done.returncode == 0, done.stderr[-9000:]
    return only_run(folder)


@pytest.fixture(scope="module")
def single(towers, tmp_path_factory):
    """Model and packing to its run in one process, made when first asked for."""
    runs = {}

    def run(name, packed):
        if (name, packed) not in runs:
            folder = tmp_path_factory.mktemp("single")
            runs[name, packed] = trained(towers, folder, name, "train.micro_batch_size=8", *(PACKED if packed else []))
        return runs[name, packed]

    return run


def assert_same(expected, run):
    for want, got in zip(train_lines(expected), train_lines(run), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    ours, theirs = (load_file(r / "checkpoints/step-5/trainable.safetensors") for r in (expected, run))
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("layout", some(CHOSEN, {*CHOSEN} - {"ZeRO-2", "pipeline of 2"}))
def test_llava_in_any_layout_equals_a_single_process(towers, tmp_path, single, layout):
    ranks, options = LAYOUTS[layout]
    run = trained(towers, tmp_path, "LLaVA", *options, ranks=ranks)
    assert_same(single("LLaVA", False), run)
    parts = {name.split(".")[0] for name in load_file(run / "checkpoints/step-5/trainable.safetensors")}
    assert parts == {"visual_encoder", "mm_projector", "llm_model"}


@pytest.mark.parametrize("layout", some(["data-parallel", "ZeRO-3", "pipeline of 2"], {"data-parallel", "ZeRO-3"}))
def test_packed_rows_too(towers, tmp_path, single, layout):
    ranks, options = LAYOUTS[layout]
    assert_same(single("LLaVA", True), trained(towers, tmp_path, "LLaVA", *options, *PACKED, ranks=ranks))


@pytest.mark.parametrize(
    "layout", some(["data-parallel", "ZeRO-3", "pipeline of 2"], {"data-parallel", "pipeline of 2"})
)
def test_parameters_that_are_read_without_a_call(towers, tmp_path, single, layout):
    name = "SigLIP2 and a resampler"
    ranks, options = LAYOUTS[layout]
    assert_same(single(name, False), trained(towers, tmp_path, name, *options, ranks=ranks))
