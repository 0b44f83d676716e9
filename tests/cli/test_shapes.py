import pytest

from lavis.cli.shapes import CHAIN, SHIPPED
from lavis.config.recipe import load_recipe
from lavis.core.errors import CheckpointError


def test_the_chain_is_in_order_and_every_recipe_stands_on_what_comes_before():
    names = list(CHAIN)
    for name, needs in CHAIN.items():
        assert all(names.index(need) < names.index(name) for need in needs)
    exported = {name: load_recipe(f"shapes/{name}").export.path for name in names}
    assert set(SHIPPED) <= {export.removeprefix("shapes/") for export in exported.values()}
    read = {n: load_recipe(f"shapes/{n}").model for n in (*names, "align")}
    for name, llm, before in (("stage2", "llm_a", "stage1"), ("align", "llm_b", "stage2")):
        assert read[name].llm.weights == exported[llm]
        assert read[name].connector.weights.startswith(exported[before])
    for x in "ab":
        assert read[f"llm_{x}"].llm.tokenizer == exported[f"tokenizer_{x}"]


def test_the_two_llms_differ_in_family_width_and_vocabulary():
    a, b = (load_recipe(f"shapes/llm_{x}").model.llm.config for x in "ab")
    assert a["model_type"] != b["model_type"] and a["hidden_size"] != b["hidden_size"]


def test_shipping_what_was_not_built_is_an_error(tmp_path, monkeypatch):
    from lavis.cli import main, shapes

    monkeypatch.setenv("LAVIS_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="lavis shapes build"):
        shapes._ship(None)
    assert main(["shapes", "ship"]) == 1
