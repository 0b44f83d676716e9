"""Recipes: merge order, origins, and what a wrong recipe says."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lavis.config.files import needed_files
from lavis.config.recipe import load_model_config, load_preprocess_config, load_recipe, missing_files, recipe_from_dict
from lavis.core.errors import ConfigError
from lavis.core.logging import warn_once

RECIPE = """\
model:
  arch: minigpt4qwen
  model_type: qwen7b_chat
datasets:
  minigpt4_instruction:
    vis_processor:
run:
  seed: 7
  output_dir: out/${run.seed}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def error_of(path: Path, text: str = RECIPE, options: tuple[str, ...] = ()) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, options)
    return str(caught.value)


def test_later_layers_win_and_origins_name_them(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["optim.lr=3e-5", "run.test_splits=[train]"])
    expected = {
        "optim.min_lr": (1e-6, "schema"),
        "model.llm.weights": ("ckpt/Qwen7B-chat", "lavis/configs/models/minigpt4qwen/qwen7b_chat.yaml"),
        "model.media.processor": ("blip2_image_eval", "lavis/configs/models/minigpt4qwen/qwen7b_chat.yaml"),
        "run.seed": (7, str(recipe_file)),
        "run.output_dir": ("out/7", str(recipe_file)),
        "optim.lr": (3e-5, "--options"),
    }
    flat = recipe.flat()
    assert {key: (flat[key], recipe.origins[key]) for key in expected} == expected
    assert set(recipe.origins) == set(flat)
    assert [entry["split"] for entry in flat["data.test"]] == ["train"]
    assert (recipe.origins["data.train"], recipe.origins["data.test"]) == (str(recipe_file), "--options")


def test_an_interpolation_sees_the_options_and_the_schema(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["run.seed=9"]).run.output_dir == "out/9"
    assert load_recipe(recipe_file, ["run.output_dir=x${run.max_epoch}"]).run.output_dir == "x10"


def test_the_saved_config_reads_back_equal(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    again = recipe_from_dict(recipe.to_dict())
    assert (again.model, again.data, again.run) == (recipe.model, recipe.data, recipe.run)


def test_all_wrong_keys_and_values_are_told_at_once_with_place_and_mend(recipe_file: Path) -> None:
    wrong = ("batch_size_trian: 4", "init_lr: fast", "num_workers: -1", "device: gpu", "task: image_text_pretrian")
    text = RECIPE + "".join(f"  {line}\n" for line in wrong)
    message = error_of(recipe_file, text, ("model.max_txt_length=3",))
    assert f"run.batch_size_trian ({recipe_file}:10): unknown key. Did you mean 'batch_size_train'" in message
    assert f"run.init_lr ({recipe_file}:11): 'fast' has the wrong type: expected number" in message
    assert f"run.num_workers ({recipe_file}:12): -1 is below the smallest allowed value, 0" in message
    assert f"run.device ({recipe_file}:13): 'gpu' is not one of: auto, cpu, cuda" in message
    assert f"run.task ({recipe_file}:14): unknown task 'image_text_pretrian'. Did you mean" in message
    assert "model.max_txt_length (--options): unknown key. Did you mean 'max_txt_len'" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.image_size=3"], "It belongs elsewhere: model.tower.image_size"),
        (["run.train_qfromer=full"], "Did you mean 'train_qformer'"),
        (["model.arch=causal_lm", "model.model_type=default", "model.got_lara=true"], "unknown key. Did you mean"),
        (["model.lora_rank=3"], "Did you mean 'lora_r' or 'lora_parts'"),
        (["model.zzz=3"], "unknown key. Known here: arch,"),
        (["runs.seed=3"], "unknown section. Did you mean 'run'"),
        (["model.arch=minigpt4qwn"], "(--options): unknown model 'minigpt4qwn'. Did you mean 'minigpt4qwen'"),
        (["model.model_type=qwen7b_caht"], "no type 'qwen7b_caht'. Did you mean 'qwen7b_chat'"),
        (["datasets.lava_instruction.format=auto"], "unknown dataset. Did you mean 'llava_instruction'"),
        (["log.trackers=[tensorbord]"], "'tensorbord' is not one of: tensorboard, wandb, swanlab"),
        (["datasets.minigpt4_instruction.vis_processor.train.name=blip2_image"], "unknown processor 'blip2_image'"),
        (["run.output_dir=${run.sed}"], "run.output_dir: Interpolation key 'run.sed' not found"),
        (["run.output_dir=2024"], "2024 has the wrong type: expected text (put it in quotes)"),
        (["run.amp=1"], "1 has the wrong type: expected true or false"),
        (["run.seed"], "'run.seed' is not of the form key.sub=value"),
        (["run.=3"], "'run.=3' is not of the form key.sub=value"),
        (["run.seed=[1"], "option 'run.seed=[1' can't be read"),
        (["run=3"], "run (--options): 3 is not a mapping"),
        (["model=3"], "model: 3 is not a mapping"),
        (["datasets=3"], "datasets: 3 is not a mapping"),
        (["log.trackers={a: 1}"], "log.trackers (--options) is a mapping, but a list is expected (schema)"),
        (["model.arch=vlm", "init=[{from: x, parts: []}]"], "init.0.parts is empty: name tower, connector, llm"),
    ],
)
def test_a_wrong_option_says_what_and_where(recipe_file: Path, options: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:\n  seed: [1\n", ":3: not valid YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("run:\n  seed: 1\n  seed: 2\n", "duplicate key"),
        ("run: {seed: 1}\n", "lacks the section 'model' and 'data'"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_the_line(recipe_file: Path, text: str, said: str) -> None:
    message = error_of(recipe_file, text)
    assert message.startswith(str(recipe_file))
    assert said in message


def test_a_shipped_recipe_is_found_by_name_from_anywhere_and_a_missing_one_suggests_near_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "instruction_tuning/train"
    names = (name, f"{name}.yaml", f"lavis/projects/{name}.yaml")
    assert len({load_recipe(name).source for name in names}) == 1
    with pytest.raises(ConfigError, match="Did you mean 'instruction_tuning/train'"):
        load_recipe("instruction_tuning/tran.yaml")


def test_unused_keys_of_old_recipes_warn_once(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lavis"):
        for _ in range(2):
            load_recipe(recipe_file, ["run.world_size=1"])
    assert [r.getMessage() for r in caplog.records] == [
        "run.world_size (--options) has no effect any more: torchrun's environment decides."
    ]


def test_other_spellings_of_the_precision_are_read(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["run.autocast_dtype=bfloat16"]).train.autocast_dtype == "bf16"


def test_numbers_are_read_as_their_field_wants(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.max_steps=1e3", "optim.lr=1"])
    assert (recipe.train.max_steps, type(recipe.train.max_steps), type(recipe.optim.lr)) == (1000, int, float)


def test_an_empty_section_means_the_defaults_but_a_null_value_overrides(recipe_file: Path) -> None:
    recipe_file.write_text(RECIPE.replace("    vis_processor:\n", "").replace("seed: 7", "seed: 7\n  grad_norm_clip:"))
    recipe = load_recipe(recipe_file)
    assert recipe.data.train[0].path is not None
    assert recipe.optim.max_grad_norm is None


def test_missing_files_are_named_by_key_and_place(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path))
    (tmp_path / "here.json").write_text("[]")
    annotations = "datasets.minigpt4_instruction.build_info.annotations.train.storage"
    recipe = load_recipe(recipe_file, [f"{annotations}=[here.json,there.json]"])
    missing = missing_files(recipe)
    assert ("data.train.0.path", tmp_path / "there.json") in missing
    assert ("model.connector.weights", tmp_path / "ckpt/blip2/blip2_pretrained_flant5xxl.pth") in missing
    assert ("data.train.0.path", tmp_path / "here.json") not in missing


def test_what_a_part_starts_from_is_a_needed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path))
    (tmp_path / "cached.safetensors").touch()
    recipe = load_recipe("shapes/align", ["init=[{from: cached.safetensors}, {from: no/run}]"])
    starts = [(file.key, file.kind, file.name) for file in needed_files(recipe) if file.key.startswith("init.")]
    assert starts == [
        ("init.0.from", "checkpoint", str(tmp_path / "cached.safetensors")),
        ("init.1.from", "checkpoint", "no/run"),
    ]


def test_a_model_section_and_its_processors_stand_alone() -> None:
    config = load_model_config("minigpt4qwen", "qwen14b_chat", ["image_size=448"])
    assert (config.llm.weights, config.tower.image_size) == ("ckpt/Qwen-14B-Chat", 448)
    assert load_preprocess_config("blip2_qformer").text_processor.eval.name == "blip_caption"


def test_a_recipe_is_read_without_torch(recipe_file: Path) -> None:
    code = (
        "import sys; from lavis.config.recipe import load_recipe\n"
        "load_recipe(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(recipe_file)], check=True)
