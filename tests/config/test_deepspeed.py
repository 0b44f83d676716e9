"""What parallel.deepspeed and other keys say about the same things."""

import pytest

from lavis.config.recipe import load_recipe
from lavis.core.errors import ConfigError

RUNNER = "parallel.strategy=zero"
SECTION = "parallel.deepspeed"


def test_what_only_the_section_says_is_taken_over(caplog):
    options = [
        f"{SECTION}.optimizer.params.betas=[0.8,0.7]",
        f"{SECTION}.gradient_clipping=0.5",
        f"{SECTION}.fp16.enabled=true",
        f"{SECTION}.train_batch_size=auto",
    ]
    recipe = load_recipe("shapes/align", [RUNNER, *options])
    assert (recipe.optim.beta1, recipe.optim.max_grad_norm, recipe.train.autocast_dtype) == (0.8, 0.5, "fp16")
    assert recipe.origins["optim.beta1"].endswith("parallel.deepspeed.optimizer.params.betas.0")
    assert recipe.optim.beta2 == 0.98  # the recipe itself says so
    assert "optim.beta2 is 0.98" in caplog.text and "optimizer.params.betas.1 says 0.7" in caplog.text


def test_without_deepspeed_the_section_says_nothing():
    assert load_recipe("shapes/align", [f"{SECTION}.gradient_clipping=0.5"]).optim.max_grad_norm == 1.0


def test_a_wrong_value_names_its_place():
    with pytest.raises(ConfigError, match="parallel.deepspeed.gradient_clipping is 'much'.*optim.max_grad_norm"):
        load_recipe("shapes/align", [RUNNER, f"{SECTION}.gradient_clipping=much"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([RUNNER, f"{SECTION}.zero_optimization.stage=4"], "it is 0, 1, 2 or 3"),
        ([RUNNER, f"{SECTION}.zero_optimization.stage=3", "model.llm_quantization=int8"], "does not go with ZeRO-3"),
        ([RUNNER, f"{SECTION}.zero_optimization.stage=3", "export.path=somewhere"], "no rank has under ZeRO-3"),
        (["parallel.strategy=pipeline", f"{SECTION}.zero_optimization.stage=1"], "Set it to 0"),
        (["parallel.strategy=pipeline", "train.autocast_dtype=fp16"], "use bf16"),
        (["parallel.strategy=pipeline", "model.llm_quantization=int4"], "does not go with a pipeline"),
        (["parallel.strategy=pipeline", "export.path=somewhere"], "no rank of a pipeline has"),
    ],
)
def test_what_can_not_work_is_told_with_the_mend(options, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("shapes/align", options)
