"""A causal LM cut into stages is the same function."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lavis.config.init import Init
from lavis.core.errors import CheckpointError, ConfigError
from lavis.models.configs import VlmConfig
from lavis.models.llm import load_llm
from lavis.models.parts import LlmConfig, LoraSettings
from lavis.models.stages import SPLITTABLE, Part, Stage, cut, llm_part, load_part, open_llm
from lavis.models.vlm import Vlm
from lavis.objectives.sft import NextToken
from tests.models.conftest import IMAGE_ID, VOCAB, batch_of, loss_of, model_config, small_model, tower_settings

DIMENSIONS = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def write(folder, model_type, **changes):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **DIMENSIONS | changes)).eval()
    for p in llm.parameters():
        p.data += 0.1 * torch.randn_like(p)
    llm.save_pretrained(folder, max_shard_size="60KB")
    return llm


def stages(folder, sizes):
    config, tensors = open_llm(str(folder))
    for part in cut(sizes):
        llm = llm_part(config, part, torch.float32)
        load_part(llm, part, tensors, str(folder), torch.device("cpu"))
        yield part, llm


def through(parts, embeds, **settings):
    for _, llm in parts:
        embeds = llm.base_model(inputs_embeds=embeds, use_cache=False, **settings).last_hidden_state
    return llm.get_output_embeddings()(embeds)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("model_type", SPLITTABLE)
def test_the_stages_one_after_another_are_the_whole(tmp_path, model_type, changes):
    changes |= (
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
        if model_type.startswith("qwen")
        else {}
    )
    whole = write(tmp_path, model_type, **changes)
    ids = torch.randint(VOCAB, (2, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)  # two packed samples
    embeds = whole.get_input_embeddings()(ids)
    expected = whole(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
    for sizes in ([4], [1, 3], [2, 1, 1]):
        parts = list(stages(tmp_path, sizes))
        torch.testing.assert_close(through(parts, embeds, position_ids=positions), expected, rtol=1e-5, atol=1e-6)
        held = [sum(p.numel() for p in llm.parameters()) for _, llm in parts]
        if len(sizes) > 1:
            assert max(held) < sum(p.numel() for p in whole.parameters())
            assert [llm.get_input_embeddings() is not None for _, llm in parts] == [True] + [False] * (len(sizes) - 1)


def test_names_are_those_of_the_whole_model():
    part = Part(1, 2, 3, 5)
    assert (
        part.whole_name("llm_model.model.layers.1.mlp.up_proj.weight") == "llm_model.model.layers.4.mlp.up_proj.weight"
    )
    assert part.whole_name("llm_proj.weight") == "llm_proj.weight"


def test_the_stages_of_a_model_that_sees_give_its_loss(tmp_path):
    model, batch = small_model(), batch_of([15, 12], [1, 0])
    model.llm_model.save_pretrained(tmp_path)
    parts = list(stages(tmp_path, [1, 1]))
    built = [Stage(model_config(**tower_settings()), llm, part, IMAGE_ID).train() for part, llm in parts]
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("llm_model.")}
    built[0].front.load_state_dict(own, strict=False)
    hidden = built[1](built[0]((batch.input_ids, batch.position_ids, batch.pixel_values)))
    loss = NextToken().loss(built[1].scorer(), hidden, batch).loss_sum
    torch.testing.assert_close(loss, loss_of(model, batch), rtol=1e-6, atol=0)
    assert [name for name, p in built[0].whole_names() if p.requires_grad] == ["llm_proj.weight", "llm_proj.bias"]
    assert built[1].anchor.requires_grad and [name for name, p in built[1].whole_names() if p.requires_grad] == []


def test_what_is_missing_or_can_not_be_cut_is_told(tmp_path):
    write(tmp_path / "llm", "qwen2")
    for file in (tmp_path / "llm").glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("model.layers.2.mlp.up_proj.weight", None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.2.mlp.up_proj.weight"):
        list(stages(tmp_path / "llm", [2, 2]))
    write(tmp_path / "other", "gemma2", head_dim=12)
    with pytest.raises(ConfigError, match="is a gemma2; stages are known for"):
        open_llm(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="GGUF"):
        open_llm("some/model.gguf")


def test_two_blocks_over_two_stages_of_text_alone_with_adapters(tmp_path):
    config = VlmConfig(llm=LlmConfig(weights=str(tmp_path), train="lora", lora=LoraSettings(rank=2, dropout=0.0)))
    write(tmp_path, "qwen2", num_hidden_layers=2)
    model = Vlm(config, load_llm(str(tmp_path)))
    model.add_adapters()
    built = [Stage(config, llm, part, None).train() for part, llm in stages(tmp_path, [1, 1])]
    own = {name: p for stage in built for name, p in stage.whole_names() if p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == trained.keys()
    for name, p in trained.items():
        p.data.normal_(std=0.1)
        own[name].data.copy_(p)
    batch = batch_of([15, 12], [0, 0])
    hidden = built[1](built[0]((batch.input_ids, batch.position_ids, torch.empty(0))))
    torch.testing.assert_close(
        NextToken().loss(built[1].scorer(), hidden, batch).loss_sum, loss_of(model.train(), batch), rtol=1e-6, atol=0
    )


def test_each_stage_starts_from_its_part_of_a_source(tmp_path):
    """An LLM trained in full, and the projection, as `init` names them."""
    source = small_model(freeze_llm=False)
    small_model().llm_model.save_pretrained(tmp_path)
    trained = {name: p.detach().clone() for name, p in source.named_parameters() if p.requires_grad}
    save_file(trained, tmp_path / "trained.safetensors", metadata={"format": "pt"})
    config, init = model_config(**tower_settings(freeze_llm=False)), [Init(str(tmp_path / "trained.safetensors"))]
    frozen = {name: t for name, t in source.state_dict().items() if name not in trained}
    save_file(frozen | {k: v for k, v in trained.items() if k.startswith("llm_proj")}, tmp_path / "tower.safetensors")
    config.tower.weights = config.connector.weights = str(tmp_path / "tower.safetensors")
    built = [Stage(config, llm, part, IMAGE_ID, init).eval() for part, llm in stages(tmp_path, [1, 1])]
    batch = batch_of([15, 12], [1, 0])
    hidden = built[1](built[0]((batch.input_ids, batch.position_ids, batch.pixel_values)))
    torch.testing.assert_close(
        NextToken().loss(built[1].scorer(), hidden, batch).loss_sum, loss_of(source.eval(), batch), rtol=1e-6, atol=0
    )
