"""DeepSpeed checkpoints as the original program leaves them."""

import argparse
import os
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from lavis.cli import main
from lavis.core.errors import CheckpointError
from lavis.export.deepspeed import deepspeed2pth, pipe_proj2pth, pipemodel2pth, read_states
from tests.export.exports import random_run

ROOT = Path(__file__).resolve().parents[2]
WIDTH, BLOCKS, VOCAB = 6, 3, 11


@pytest.fixture
def trainer_objects(monkeypatch):
    """What DeepSpeed and a trainer save beside tensors, of classes that can't be imported when it is read."""
    module = types.ModuleType("deepspeed.runtime.fp16.loss_scaler")
    scaler = type("LossScaler", (), {"__module__": module.__name__})
    module.LossScaler = scaler
    with monkeypatch.context() as patch:
        for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        state = scaler()
        state.cur_scale = 65536.0
        yield {
            "optimizer": {"loss_scaler": state},
            "args": argparse.Namespace(lr=1e-4, betas=[0.9, 0.99]),
            "lr_scheduler": {"last": np.float64(0.5), "steps": np.int64(3), "rates": np.ones(2)},
            "param_shapes": [OrderedDict({"llm_proj.weight": torch.Size([6, 4])})],
            "sparse_tensor_module_names": set(),
            "ds_config": {"zero_optimization": {"stage": 1}},
            "global_steps": 12,
        }


def module_tensors():
    """Windows of one flat buffer, as ZeRO 1 and 2 keep their bf16 parameters."""
    flat = torch.randn(10_000).bfloat16()
    return {"llm_proj.weight": flat[:24].view(6, 4), "llm_proj.bias": flat[24:30], "query_tokens": torch.randn(1, 2, 3)}


def test_the_module_of_a_zero_checkpoint_becomes_model_pth(tmp_path, trainer_objects):
    tensors = module_tensors()
    torch.save({"module": tensors, **trainer_objects}, tmp_path / "mp_rank_00_model_states.pt")
    file = deepspeed2pth(tmp_path)
    written = torch.load(file, weights_only=True)
    assert file == tmp_path / "model.pth" and written.keys() == tensors.keys()
    assert all(
        torch.equal(written[name], tensors[name]) and written[name].dtype == tensors[name].dtype for name in tensors
    )
    assert file.stat().st_size < 5000  # not the buffer
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_stand_ins_are_inert_and_the_rest_is_read(tmp_path, trainer_objects):
    torch.save({"module": {}, **trainer_objects}, tmp_path / "states.pt")
    states = read_states(tmp_path / "states.pt")
    assert states["global_steps"] == 12 and states["param_shapes"][0]["llm_proj.weight"] == torch.Size([6, 4])
    assert vars(states["args"]) == {} and vars(states["optimizer"]["loss_scaler"]) == {}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


class Sly:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('evil-was-here')",)


@pytest.mark.parametrize(("what", "named"), [(Evil(), "mkdir"), (Sly(), "eval")])
def test_a_malicious_checkpoint_is_refused_and_nothing_runs(tmp_path, monkeypatch, what, named):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": module_tensors(), "args": what}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=f"holds more than a trainer saves, which was not loaded: .*{named}"):
        deepspeed2pth(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mp_rank_00_model_states.pt"]


def test_truncated_missing_and_other_checkpoints_are_told(tmp_path):
    file = tmp_path / "mp_rank_00_model_states.pt"
    with pytest.raises(
        CheckpointError, match="has no mp_rank_00_model_states.pt. Give the folder of one epoch or step"
    ):
        deepspeed2pth(tmp_path)
    torch.save({"module": module_tensors()}, file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="mp_rank_00_model_states.pt can't be read"):
        deepspeed2pth(tmp_path)
    torch.save({"module": None}, file)
    with pytest.raises(CheckpointError, match="has no tensors under 'module'"):
        deepspeed2pth(tmp_path)
    with pytest.raises(CheckpointError, match="It looks like a ZeRO checkpoint: deepspeed2pth"):
        pipe_proj2pth(tmp_path)
    torch.save({}, tmp_path / "layer_00-model_states.pt")
    with pytest.raises(CheckpointError, match="checkpoint of the pipeline: use pipe_proj2pth"):
        deepspeed2pth(tmp_path)


def block(generation):
    names = {
        1: [
            "ln_1.weight",
            "attn.c_attn.weight",
            "attn.c_attn.bias",
            "attn.c_proj.weight",
            "ln_2.weight",
            "mlp.w1.weight",
            "mlp.w2.weight",
            "mlp.c_proj.weight",
        ],
        2: ["input_layernorm.weight", "self_attn.q_proj.weight", "mlp.gate_proj.weight"],
    }
    return {f"layer.{name}": torch.randn(WIDTH) for name in names[generation]}


def pipeline_layers(generation=1):
    """Tensors of each pipeline layer of the original: vision and embedding, four empty ones, blocks, final norm, head,
    loss.
    """
    vision = {"visionpipe.visual_encoder.cls_token": torch.randn(1, 1, 5), "visionpipe.ln_vision.weight": torch.ones(5)}
    projection = {"visionpipe.llm_proj.weight": torch.randn(WIDTH, 4), "visionpipe.llm_proj.bias": torch.randn(WIDTH)}
    first = vision | projection | {"wtepipe.word_embeddings.weight": torch.randn(VOCAB, WIDTH)}
    last = [{"final_layernorm.weight": torch.randn(WIDTH)}, {"lm_head.weight": torch.randn(VOCAB, WIDTH)}, {}]
    return [first, {}, {}, {}, {}, *(block(generation) for _ in range(BLOCKS)), *last]


def write_pipeline(folder, layers):
    for i, tensors in enumerate(layers):
        torch.save(OrderedDict(tensors), folder / f"layer_{i:02d}-model_states.pt")
    torch.save({"module": None, "global_steps": 7}, folder / "mp_rank_00_model_states.pt")
    return folder


def test_the_projection_leaves_the_pipeline(tmp_path):
    layers = pipeline_layers()
    written = torch.load(pipe_proj2pth(write_pipeline(tmp_path, layers)), weights_only=True)
    assert {k: v.tolist() for k, v in written.items()} == {
        "llm_proj.weight": layers[0]["visionpipe.llm_proj.weight"].tolist(),
        "llm_proj.bias": layers[0]["visionpipe.llm_proj.bias"].tolist(),
    }


@pytest.mark.parametrize(
    ("generation", "embedding", "blocks", "norm"),
    [
        (1, "transformer.wte.weight", "transformer.h", "transformer.ln_f.weight"),
        (2, "model.embed_tokens.weight", "model.layers", "model.norm.weight"),
    ],
)
def test_the_language_model_leaves_the_pipeline_under_its_own_names(tmp_path, generation, embedding, blocks, norm):
    layers = pipeline_layers(generation)
    file = pipemodel2pth(write_pipeline(tmp_path, layers))
    wanted = {
        "llm_proj.weight": layers[0]["visionpipe.llm_proj.weight"],
        "llm_proj.bias": layers[0]["visionpipe.llm_proj.bias"],
        f"llm_model.{embedding}": layers[0]["wtepipe.word_embeddings.weight"],
        f"llm_model.{norm}": layers[5 + BLOCKS]["final_layernorm.weight"],
        "llm_model.lm_head.weight": layers[6 + BLOCKS]["lm_head.weight"],
    }
    for i in range(BLOCKS):
        wanted |= {f"llm_model.{blocks}.{i}.{name[6:]}": tensor for name, tensor in layers[5 + i].items()}
    written = torch.load(file, weights_only=True)
    assert file.name == "unfreeze_llm_model.pth" and written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


def test_an_incomplete_pipeline_is_told(tmp_path):
    write_pipeline(tmp_path, pipeline_layers())
    middle = tmp_path / "layer_06-model_states.pt"
    whole = torch.load(middle, weights_only=True)
    torch.save({k: v for k, v in whole.items() if "w2" not in k}, middle)
    with pytest.raises(CheckpointError, match="layer 6 in .* holds other tensors than layer 5"):
        pipemodel2pth(tmp_path)
    middle.unlink()
    with pytest.raises(CheckpointError, match="layer 6 in .* is missing"):
        pipemodel2pth(tmp_path)
    torch.save(whole, middle)
    (tmp_path / f"layer_{5 + BLOCKS:02d}-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="no layer in .* holds final_layernorm.weight: is a file missing?"):
        pipemodel2pth(tmp_path)
    torch.save({}, tmp_path / "layer_00-model_states.pt")
    with pytest.raises(CheckpointError, match="layer_00-model_states.pt has no visionpipe.llm_proj.bias"):
        pipe_proj2pth(tmp_path)
    torch.save({}, tmp_path / "layer_00-model_01-model_states.pt")
    with pytest.raises(CheckpointError, match="tensor parallelism"):
        pipe_proj2pth(tmp_path)


ZERO3 = """
import os, sys, torch, deepspeed
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.LayerNorm(3))
model[0].requires_grad_(False)
groups = [{"params": [model[1].weight]}, {"params": [model[1].bias, *model[2].parameters()]}]
optimizer = torch.optim.AdamW(groups, lr=0.1)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(torch.ones(1, 5)).square().sum())
engine.step()
engine.save_checkpoint(sys.argv[1], tag="epoch_0", exclude_frozen_parameters=True)
torch.distributed.barrier()
os._exit(0)  # when Python ends by itself, threads of gloo sometimes abort the process
"""


def test_the_pieces_of_a_zero_3_checkpoint_are_put_together(tmp_path, deepspeed_operators):
    """Against DeepSpeed's own way, on what DeepSpeed itself wrote; no size divides by the two ranks."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    (tmp_path / "script.py").write_text(ZERO3)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, "script.py", str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="epoch_0", exclude_frozen_parameters=True)
    written = torch.load(deepspeed2pth(tmp_path / "epoch_0"), weights_only=True)
    assert written.keys() == expected.keys() == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    next((tmp_path / "epoch_0").glob("*rank_1_*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="has 0 files .*rank_1_"):
        deepspeed2pth(tmp_path / "epoch_0")


@pytest.mark.parametrize("script", ["deepspeed2pth", "pipe_proj2pth"])
def test_they_take_our_own_checkpoints_too(tmp_path, script):
    run = random_run(tmp_path)
    assert main(["convert", script, "--ckpt_dir", str(run)]) == 0
    written = torch.load(run / "model.pth", weights_only=True)
    assert written["model"].keys() == {"llm_proj.weight", "llm_proj.bias"}


@pytest.mark.parametrize("script", ["deepspeed2pth", "pipe_proj2pth", "pipemodel2pth"])
def test_the_commands_of_the_original_work(tmp_path, script, capsys):
    write_pipeline(tmp_path, pipeline_layers())
    torch.save({"module": module_tensors()}, tmp_path / "mp_rank_00_model_states.pt")
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--ckpt_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.pth")
    assert str(written) in done.stdout
    written.unlink()
    assert main(["convert", script, "--ckpt-dir", str(tmp_path)]) == 0 and written.is_file()
    assert main(["convert", script, "--ckpt-dir", str(tmp_path / "none")]) == 1
    assert "model_states.pt" in capsys.readouterr().err


def test_convert_pipeline_gives_what_was_trained(tmp_path):
    for name in ("theirs", "projection", "lora", "llm"):
        (tmp_path / name).mkdir()
    theirs = write_pipeline(tmp_path / "theirs", pipeline_layers())
    runs = {
        "projection": random_run(tmp_path / "projection"),
        "lora": random_run(tmp_path / "lora", get_lora=True),
        "llm": random_run(tmp_path / "llm", freeze_llm=False),
    }
    for run in runs.values():
        assert main(["convert", "pipeline", "--ckpt_dir", str(run)]) == 0
    assert main(["convert", "pipeline", "--ckpt_dir", str(theirs)]) == 0
    assert main(["convert", "pipeline", "--llm", "--ckpt_dir", str(theirs)]) == 0
    assert (theirs / "model.pth").is_file() and (theirs / "unfreeze_llm_model.pth").is_file()
    assert (runs["projection"] / "model.pth").is_file()
    assert (runs["lora"] / "adapters/adapter_model.safetensors").is_file()
    assert any(
        name.startswith("llm_model.")
        for name in torch.load(runs["llm"] / "unfreeze_llm_model.pth", weights_only=True)["model"]
    )
