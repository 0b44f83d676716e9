"""The released files of BLIP-2 fit the real-size tower, key by key, without a byte of weights: all is on the meta
device.
"""

import torch

from lavis.models.connectors import qformer_linear
from lavis.models.towers import eva
from tests.models.conftest import model_config

WIDTH, MLP, BERT, BERT_MLP = 1408, 6144, 768, 3072


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def eva_vit_g():
    """eva_vit_g.pth: 40 blocks and bare names."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 257, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(40):
        block = f"blocks.{i}."
        shapes |= norm(block + "norm1", WIDTH) | norm(block + "norm2", WIDTH)
        shapes |= {
            block + "attn.q_bias": (WIDTH,),
            block + "attn.v_bias": (WIDTH,),
            block + "attn.qkv.weight": (3 * WIDTH, WIDTH),
        }
        shapes |= (
            linear(block + "attn.proj", WIDTH, WIDTH)
            | linear(block + "mlp.fc1", MLP, WIDTH)
            | linear(block + "mlp.fc2", WIDTH, MLP)
        )
    return shapes


def blip2_flant5xxl():
    """What blip2_pretrained_flant5xxl.pth holds under `model`: queries, ln_vision, Q-Former with its text branch, the
    T5 projection.
    """
    shapes = {"query_tokens": (1, 32, BERT)} | norm("ln_vision", WIDTH) | linear("t5_proj", 4096, BERT)
    embeddings = "Qformer.bert.embeddings."
    shapes |= norm(embeddings + "LayerNorm", BERT) | {embeddings + "word_embeddings.weight": (30523, BERT)}
    shapes |= {embeddings + "position_embeddings.weight": (512, BERT), embeddings + "position_ids": (1, 512)}
    for i in range(12):
        layer = f"Qformer.bert.encoder.layer.{i}."
        for kind, width in (("attention", BERT), ("crossattention", WIDTH)) if i % 2 == 0 else (("attention", BERT),):
            own = f"{layer}{kind}."
            shapes |= (
                linear(own + "self.query", BERT, BERT)
                | linear(own + "self.key", BERT, width)
                | linear(own + "self.value", BERT, width)
            )
            shapes |= linear(own + "output.dense", BERT, BERT) | norm(own + "output.LayerNorm", BERT)
        for suffix in ("", "_query"):
            shapes |= linear(f"{layer}intermediate{suffix}.dense", BERT_MLP, BERT)
            shapes |= linear(f"{layer}output{suffix}.dense", BERT, BERT_MLP) | norm(
                f"{layer}output{suffix}.LayerNorm", BERT
            )
    return (
        shapes
        | linear("Qformer.cls.predictions.transform.dense", BERT, BERT)
        | {"Qformer.cls.predictions.bias": (30523,)}
    )


def test_the_released_files_fill_the_whole_tower(monkeypatch):
    files = {"eva_vit_g.pth": eva_vit_g(), "blip2_pretrained_flant5xxl.pth": blip2_flant5xxl()}
    for module in (eva, qformer_linear):
        monkeypatch.setattr(
            module, "read_tensors", lambda path: {k: torch.empty(s, device="meta") for k, s in files[path].items()}
        )
    monkeypatch.setattr(eva.EvaTower, "complete", lambda self: None)
    config = model_config()
    with torch.device("meta"):
        tower = eva.EvaTower(config.tower)
        connector = qformer_linear.QFormer(config.connector, config.tower.width())
    assert all(p.is_meta for part in (tower, connector) for p in part.parameters())
    vit = tower.load("eva_vit_g.pth")
    rest = connector.load("blip2_pretrained_flant5xxl.pth")
    own = {f"visual_encoder.{name}" for name in tower.model.state_dict()} | {*connector.state_dict()}
    assert {*vit.loaded, *rest.loaded} == own
    assert len(vit.loaded) == 4 + 39 * 13 and {name.split(".")[2] for name in vit.ignored} == {"39"}
    assert round(sum(p.numel() for p in tower.parameters()), -6) == 986_000_000
    left_out = {
        name
        for name in rest.ignored
        if not name.startswith(("t5_proj", "Qformer.cls", "Qformer.embeddings", "Qformer.bert.embeddings"))
    }
    assert {name.split(".")[4] for name in left_out} == {"intermediate", "output"}  # the text branch's feed-forward
