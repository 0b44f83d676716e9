"""What a training step keeps for its backward pass, in fp32, under bf16 autocast, and with activation checkpointing."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A transformer block's feed-forward part: norm, wide layer, GELU, narrow layer, residual."""

    forwards = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Block.forwards += 1
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, width: int, depth: int, recompute: bool) -> None:
        super().__init__()
        self.blocks, self.recompute = nn.ModuleList(Block(width) for _ in range(depth)), recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def step(*, frozen: bool, dtype: torch.dtype, recompute: bool) -> tuple[float, int, torch.Tensor]:
    """(MB kept between forward and backward, forwards of a block in both, gradient of the input)."""
    torch.manual_seed(0)
    model = Stack(256, 8, recompute).requires_grad_(not frozen)
    # nothing updates them, so they need no fp32 copy: autocast then has nothing to cast and keep
    if frozen and dtype == torch.bfloat16:
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            linear.to(dtype)
    x = torch.randn(4, 128, 256, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:  # they are there anyway
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    Block.forwards = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        loss = model(x).float().square().mean()
    megabytes = sum(kept.values()) / 1e6
    loss.backward()
    return megabytes, Block.forwards, x.grad


def main() -> None:
    print(f"{'weights':9}{'precision':11}{'recompute':11}{'kept':>10}{'forwards':>10}  gradient of the input")
    exact = None
    for frozen in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for recompute in (False, True):
                kept, forwards, gradient = step(frozen=frozen, dtype=dtype, recompute=recompute)
                exact = gradient if exact is None else exact
                error = ((gradient - exact).norm() / exact.norm()).item()
                words = (
                    "frozen" if frozen else "trained",
                    "bf16" if dtype == torch.bfloat16 else "fp32",
                    "yes" if recompute else "no",
                )
                print(f"{words[0]:9}{words[1]:11}{words[2]:11}{kept:7.1f} MB{forwards:10}  {error:.0e} off")


if __name__ == "__main__":
    main()
