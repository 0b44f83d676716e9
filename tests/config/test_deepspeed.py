"""What run.deepspeed_config and the rest of `run` say about the same things."""

import pytest

from lavis.config.recipe import load_recipe
from lavis.core.errors import ConfigError

RUNNER = "run.runner=deepspeed_runner"
SECTION = "run.deepspeed_config"


def test_what_only_the_section_says_is_taken_over(caplog):
    options = [
        f"{SECTION}.optimizer.params.betas=[0.8,0.7]",
        f"{SECTION}.gradient_clipping=0.5",
        f"{SECTION}.fp16.enabled=true",
        f"{SECTION}.train_batch_size=auto",
    ]
    recipe = load_recipe("shapes/align", [RUNNER, *options])
    run = recipe.run
    assert (run.beta1, run.grad_norm_clip, run.autocast_dtype) == (0.8, 0.5, "fp16")
    assert recipe.origins["run.beta1"].endswith("run.deepspeed_config.optimizer.params.betas.0")
    assert run.beta2 == 0.98  # the recipe itself says so
    assert "run.beta2 is 0.98" in caplog.text and "optimizer.params.betas.1 says 0.7" in caplog.text


def test_without_deepspeed_the_section_says_nothing():
    assert load_recipe("shapes/align", [f"{SECTION}.gradient_clipping=0.5"]).run.grad_norm_clip == 1.0


def test_a_wrong_value_names_its_place():
    with pytest.raises(ConfigError, match="run.deepspeed_config.gradient_clipping is 'much'.*run.grad_norm_clip"):
        load_recipe("shapes/align", [RUNNER, f"{SECTION}.gradient_clipping=much"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([RUNNER, f"{SECTION}.zero_optimization.stage=4"], "it is 0, 1, 2 or 3"),
        ([RUNNER, f"{SECTION}.zero_optimization.stage=3", "model.llm_quantization=int8"], "does not go with ZeRO-3"),
        ([RUNNER, f"{SECTION}.zero_optimization.stage=3", "run.export=somewhere"], "no rank has under ZeRO-3"),
        (["run.runner=pipeline_runner", f"{SECTION}.zero_optimization.stage=1"], "Set it to 0"),
        (["run.runner=pipeline_runner", "run.autocast_dtype=fp16"], "use bf16"),
        (["run.runner=pipeline_runner", "model.llm_quantization=int4"], "does not go with a pipeline"),
        (["run.runner=pipeline_runner", "run.export=somewhere"], "no rank of a pipeline has"),
    ],
)
def test_what_can_not_work_is_told_with_the_mend(options, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("shapes/align", options)
