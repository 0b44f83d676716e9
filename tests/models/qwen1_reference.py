"""First-generation Qwen in plain PyTorch, as its report and configuration have it, and small folders in its format."""

import base64
import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "kv_channels": 12,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 128,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 512,
}
SEVEN_B = CONFIG | {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "seq_length": 8192,
    "vocab_size": 151936,
}
FOURTEEN_B = SEVEN_B | {
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "max_position_embeddings": 8192,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "seq_length": 2048,
    "vocab_size": 152064,
}
"""The published dimensions."""


def layout(config):
    """Every tensor of a Qwen-1 checkpoint with its shape."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes = {
        "transformer.wte.weight": (vocab, width),
        "transformer.ln_f.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for i in range(config["num_hidden_layers"]):
        h = f"transformer.h.{i}."
        shapes |= {f"{h}ln_1.weight": (width,), f"{h}ln_2.weight": (width,)}
        shapes |= {
            f"{h}attn.c_attn.weight": (3 * width, width),
            f"{h}attn.c_attn.bias": (3 * width,),
            f"{h}attn.c_proj.weight": (width, width),
        }
        shapes |= {
            f"{h}mlp.w1.weight": (mlp, width),
            f"{h}mlp.w2.weight": (mlp, width),
            f"{h}mlp.c_proj.weight": (width, mlp),
        }
    return shapes


def random_weights(config=CONFIG, seed=0):
    """Non-trivial values everywhere: norms around 1, biases as large as what they are added to."""
    torch.manual_seed(seed)
    weights = {}
    for name, shape in layout(config).items():
        spread = 0.5 if len(shape) == 1 else 1.2 / shape[1] ** 0.5
        weights[name] = spread * torch.randn(shape) + (1.0 if ".ln_" in name else 0.0)
    return weights


def logits(weights, ids, config=CONFIG):
    """[L, vocabulary] for the ids [L] of one sequence."""
    heads, eps, base = config["num_attention_heads"], config["layer_norm_epsilon"], config["rotary_emb_base"]
    length, size = len(ids), config["kv_channels"]
    angles = torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, size, 2).float() / size))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[name]

    def rotated(x):  # [L, heads, size]: the first half of a head turns with its second half
        first, second = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = weights["transformer.wte.weight"][ids]
    causal = torch.full((length, length), float("-inf")).triu(1)
    for i in range(config["num_hidden_layers"]):
        h = f"transformer.h.{i}."
        fused = norm(x, f"{h}ln_1.weight") @ weights[f"{h}attn.c_attn.weight"].T + weights[f"{h}attn.c_attn.bias"]
        q, k, v = (part.reshape(length, heads, size) for part in fused.split(heads * size, dim=-1))
        scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / size**0.5 + causal
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)
        x = x + mixed @ weights[f"{h}attn.c_proj.weight"].T
        y = norm(x, f"{h}ln_2.weight")
        branches = (y @ weights[f"{h}mlp.w1.weight"].T) * F.silu(y @ weights[f"{h}mlp.w2.weight"].T)
        x = x + branches @ weights[f"{h}mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T


def write_folder(folder, weights, config=CONFIG, form="safetensors", shards=3):
    """A Qwen-1 folder: `form` safetensors or bin, in one file or in `shards` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    settings = {
        "chat_format": "chatml",
        "do_sample": True,
        "eos_token_id": 300,
        "max_new_tokens": 512,
        "pad_token_id": 300,
        "top_k": 0,
        "top_p": 0.8,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    save = save_file if form == "safetensors" else torch.save
    stem = {"safetensors": "model", "bin": "pytorch_model"}[form]
    names = list(weights)
    if shards == 1:
        save(weights, folder / f"{stem}.{form}")
        return folder
    files = {name: f"{stem}-{i * shards // len(names) + 1:05d}-of-{shards:05d}.{form}" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save({n: weights[n].contiguous() for n in names if files[n] == file}, folder / file)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_vocabulary(folder, merges=()):
    """A qwen.tiktoken of the 256 bytes and `merges` (bytes each), in this order; returns token to id."""
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *merges])}
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return ranks
