"""What each of two ranks holds under ZeRO 0 to 3, and how a pipeline passes micro-batches on.

Starts its own two processes.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)]


def elements(tensors) -> int:
    return sum(t.numel() for t in tensors)


def say(text: str) -> None:
    os.write(1, f"  {text}\n".encode())  # in one piece: two processes write


def zero(stage: int) -> tuple[str, float]:
    """(what this rank holds, loss after three steps)."""
    import deepspeed

    model = nn.Sequential(*layers(), nn.Linear(256, 1))
    total = elements(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(engine.global_rank)
    for _ in range(3):
        x = torch.randn(8, 256)
        loss = (engine(x) - x.mean(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
    weights = elements(p.ds_tensor for p in model.parameters()) if stage == 3 else elements(model.parameters())
    state = elements(v for s in optimizer.state.values() for k, v in s.items() if k == "exp_avg")
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return f"{weights / total:7.0%} of the weights {state / total:7.0%} of AdamW's state", mean.item() / 2


def pipeline() -> None:
    """Two stages, four micro-batches; each forward and backward is printed as it happens."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    class Told(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.i, self.layer, self.count = i, layers()[i], 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.i % 2 == 0:  # the first layer of a stage
                self.count += 1
                say(f"stage {self.i // 2}: forward of micro-batch {self.count}")
            return self.layer(x)

    deepspeed.init_distributed(verbose=False)
    model = PipelineModule(
        [LayerSpec(Told, i) for i in range(4)], num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4, "steps_per_print": 10**9}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config
    )
    data = iter([(torch.randn(8, 256), torch.zeros(8, 256))] * 4)
    loss = engine.train_batch(data)
    say(f"stage {engine.stage_id}: holds {elements(model.parameters()):,} weights; loss {loss.item():.4f}")


def rank() -> None:
    logging.disable(logging.WARNING)
    what = sys.argv[1]
    if what == "pipeline":
        return pipeline()
    holds, loss = zero(int(what))
    say(f"rank {os.environ['RANK']}: {holds}, loss {loss:.6f}")


def main() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "DS_ACCELERATOR": "cpu"}
    for what in ("0", "1", "2", "3", "pipeline"):
        print(f"ZeRO-{what}" if what.isdigit() else "A pipeline of two stages", flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        print("\n".join(line for line in done.stdout.splitlines() if line.startswith("  ")), flush=True)


if __name__ == "__main__":
    rank() if len(sys.argv) > 1 else main()
