"""Loading language models: GGUF files, quantised weights, layers that transformers has placed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lavis.core.errors import CheckpointError
from lavis.models.llm import load_llm
from lavis.models.vlm import Vlm
from tests.models.conftest import IMAGE_ID, batch_of, loss_of, randomize, small_llm, small_model

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(llm: torch.nn.Module, file: Path) -> None:
    """A Qwen2 in fp32 under GGUF's names."""
    gguf = pytest.importorskip("gguf")
    c = llm.config
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    for name, value in llm.state_dict().items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        stem = f"blk.{block[1]}.{GGUF_NAMES[block[2]]}" if block else GGUF_NAMES[module]
        writer.add_tensor(f"{stem}.{kind}", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = randomize(small_llm()).eval()
    write_gguf(source, tmp_path / "small.gguf")
    ids = torch.randint(0, 300, (2, 9))
    loaded = load_llm(str(tmp_path / "small.gguf")).eval()
    assert torch.allclose(loaded(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_absent_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent.gguf does not exist"):
        load_llm(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_llm_trains_the_projection(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    source = small_model()
    source.llm_model.save_pretrained(tmp_path)
    batch = batch_of([20, 15], [1, 1])
    losses, gradients = [], []
    for llm in (load_llm(str(tmp_path)), load_llm(str(tmp_path), quantization=kind)):
        model = Vlm(source.config, llm, IMAGE_ID)
        rest = {k: v for k, v in source.state_dict().items() if not k.startswith("llm_model.")}
        model.load_state_dict(rest, strict=False)
        loss = loss_of(model.train(), batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.connector.llm_proj.weight.grad.flatten())
    assert losses[0] != losses[1]  # it is quantised
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def test_a_placeholder_needs_no_row_in_the_embedding() -> None:
    model, batch = small_model(), batch_of([20, 15], [1, 2])
    with torch.no_grad():
        first = loss_of(model, batch)
        batch.input_ids[batch.input_ids == IMAGE_ID] = 10_000
        model.image_token_id = 10_000
        assert torch.equal(loss_of(model, batch), first)


def test_a_placed_llm_stays_where_it_is() -> None:
    model = small_model(llm_device_map="cpu").to("meta")
    assert model.connector.llm_proj.weight.is_meta and model.connector.query_tokens.is_meta
    assert not next(model.llm_model.parameters()).is_meta
