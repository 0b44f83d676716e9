"""Peak host memory and time of loading a sharded LLM, whole and as stages of a pipeline, as shares of what is loaded:
python benchmarks/host_memory.py [--gib 2] [--stages 4]

A synthetic LLM is written to a temporary folder in each layout and loaded in a process of its own. What counts is the
growth of the process's
resident memory from after the imports to its peak, pages mapped from the files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, MLP, HEADS, VOCAB = 2048, 5504, 16, 32_000
LIMIT, STAGE_LIMIT = 1.2, 1.15
"""Most memory, as a share of the weights: of the whole LLM, and of a stage."""
CHILD = """
import json, re, sys, time, torch
from pathlib import Path
from lavis.models.llm import load_llm
import lavis.models.stages
import transformers.models.qwen2.modeling_qwen2
status = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
before, start = status("VmRSS"), time.perf_counter()
LOAD
for p in llm.parameters():
    p.flatten()[:: 4096 // p.element_size()].sum()  # every page, so that what is only mapped counts too
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for p in llm.parameters()) / 2**30
print(json.dumps({"size": size, "peak": status("VmHWM") - before, "seconds": seconds}))
"""
WHOLE = "llm = load_llm(sys.argv[1], torch.bfloat16)"
STAGE = """
from lavis.models.stages import cut, llm_part, load_part, open_llm
config, tensors = open_llm(sys.argv[1])
part = cut(json.loads(sys.argv[2]))[int(sys.argv[3])]
llm = llm_part(config, part, torch.bfloat16)
load_part(llm, part, tensors, sys.argv[1], torch.device("cpu"))
"""


def qwen1_block(i: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block of first-generation Qwen."""
    p = f"transformer.h.{i}."
    shapes = {
        "ln_1.weight": (WIDTH,),
        "ln_2.weight": (WIDTH,),
        "attn.c_attn.weight": (3 * WIDTH, WIDTH),
        "attn.c_attn.bias": (3 * WIDTH,),
    }
    shapes |= {
        "attn.c_proj.weight": (WIDTH, WIDTH),
        "mlp.w1.weight": (MLP, WIDTH),
        "mlp.w2.weight": (MLP, WIDTH),
        "mlp.c_proj.weight": (WIDTH, MLP),
    }
    return {p + k: v for k, v in shapes.items()}


def qwen2_block(i: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block of Qwen2."""
    p = f"model.layers.{i}."
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
    }
    shapes |= {f"self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkvo"} | {
        f"self_attn.{n}_proj.bias": (WIDTH,) for n in "qkv"
    }
    shapes |= {
        "mlp.gate_proj.weight": (MLP, WIDTH),
        "mlp.up_proj.weight": (MLP, WIDTH),
        "mlp.down_proj.weight": (WIDTH, MLP),
    }
    return {p + k: v for k, v in shapes.items()}


QWEN1_ENDS = {
    "transformer.wte.weight": (VOCAB, WIDTH),
    "transformer.ln_f.weight": (WIDTH,),
    "lm_head.weight": (VOCAB, WIDTH),
}
QWEN2_ENDS = {
    "model.embed_tokens.weight": (VOCAB, WIDTH),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (VOCAB, WIDTH),
}
QWEN1_CONFIG = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": WIDTH,
    "intermediate_size": 2 * MLP, "num_attention_heads": HEADS, "kv_channels": WIDTH // HEADS,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 2048, "no_bias": True,
    "max_position_embeddings": 8192, "vocab_size": VOCAB, "tie_word_embeddings": False,
    "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
QWEN2_CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": WIDTH, "intermediate_size": MLP,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LAYOUTS = {
    "Qwen2, safetensors": (
        QWEN2_CONFIG,
        qwen2_block,
        QWEN2_ENDS,
        "model-{:05}.safetensors",
        "model.safetensors.index.json",
    ),
    "Qwen-1, safetensors": (
        QWEN1_CONFIG,
        qwen1_block,
        QWEN1_ENDS,
        "model-{:05}.safetensors",
        "model.safetensors.index.json",
    ),
    "Qwen-1, .bin": (QWEN1_CONFIG, qwen1_block, QWEN1_ENDS, "pytorch_model-{:05}.bin", "pytorch_model.bin.index.json"),
}


def write_llm(folder: Path, layout: str, blocks: int) -> None:
    """A random bf16 LLM of `blocks` blocks, four to a shard."""
    config, block, ends, pattern, index = LAYOUTS[layout]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
    groups = [
        ends,
        *({k: v for i in range(b, min(b + 4, blocks)) for k, v in block(i).items()} for b in range(0, blocks, 4)),
    ]
    places: dict[str, str] = {}
    for number, shapes in enumerate(groups):
        tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
        file = folder / pattern.format(number)
        (
            save_file(tensors, file, metadata={"format": "pt"})
            if file.suffix == ".safetensors"
            else torch.save(tensors, file)
        )
        places |= dict.fromkeys(tensors, file.name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def measure(code: str, *arguments: str) -> dict[str, float]:
    """Size (GiB), peak (GiB) and seconds of a process that loads."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("LOAD", code), *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(what: str, found: dict[str, float], limit: float) -> bool:
    """Print a line; whether it is above the limit."""
    share = found["peak"] / found["size"]
    print(
        f"{what}: {found['size']:.2f} GiB of weights, peak {found['peak']:.2f} GiB = {share:.2f} x (limit {limit}),"
        f" {found['seconds']:.1f} s",
        flush=True,
    )
    return share > limit


def main() -> int:
    """Print the figures; 1 if one passes its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the LLM")
    parser.add_argument("--stages", type=int, default=4, help="stages of the pipeline")
    args = parser.parse_args()
    per_block = 2 * sum(torch.Size(s).numel() for s in qwen2_block(0).values())
    blocks = round((args.gib * 2**30 - 4 * VOCAB * WIDTH) / per_block)
    sizes = [blocks // args.stages + (i < blocks % args.stages) for i in range(args.stages)]
    heavy = False
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            write_llm(Path(folder), layout, blocks)
            heavy |= report(layout, measure(WHOLE, folder), LIMIT)
            for i in range(args.stages):
                heavy |= report(
                    f"  stage {i} of {args.stages}", measure(STAGE, folder, json.dumps(sizes), str(i)), STAGE_LIMIT
                )
    return int(heavy)


if __name__ == "__main__":
    sys.exit(main())
