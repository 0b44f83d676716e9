"""What an LLM's head says of hidden states, at the positions an objective asks for and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

LOGITS_CHUNK_BYTES = 128 << 20
"""Above this many bytes of fp32 logits they are made in chunks."""
KEPT_LOGITS_BYTES = 1 << 20
"""Up to this many bytes of logits autograd may keep them, in the order of whose sums small runs were made before."""

_Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _as_many(calls: int) -> int:
    return calls


class Scorer:
    """The head of `llm` on hidden states [n, D] behind the final norm: the same for a whole model and a last stage.

    calls: given how many chunks this rank's positions make, how many times the head is called. Ranks that each hold a
    part of its weights (ZeRO-3) have to call it equally often, and agree on the most.
    """

    def __init__(self, llm: PreTrainedModel, calls: Callable[[int], int] | None = None) -> None:
        self._head, self._calls = llm.get_output_embeddings(), calls or _as_many
        config = llm.config.get_text_config()
        self._scale, self._softcap = logits_scale(config), logits_softcap(config)

    @property
    def num_weights(self) -> int:
        """Of the head's matrix."""
        return self._head.in_features * self._head.out_features

    def gives_gradient(self, hidden: torch.Tensor, count: int) -> bool:
        """Whether the gradient by `hidden` of `count` positions is made beside the loss: if there are more than a few
        logits, the head has none itself, its weight is whole here, and the numbers are not so small (fp16's, before
        the loss is scaled) that they would be lost.
        """
        if 4 * count * self._head.out_features <= KEPT_LOGITS_BYTES:
            return False
        head, device = self._head, hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
        return frozen and self._calls is _as_many and dtype != torch.float16

    def loss_and_gradient(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed cross-entropy and its gradient by `hidden`, chunk by chunk: logits are made once, and neither
        they nor their logarithms are kept for the backward pass.
        """
        gradient, sums = torch.empty_like(hidden), []
        for start in range(0, len(targets), self.rows):
            chunk = slice(start, start + self.rows)
            raw, goal = self._head(hidden[chunk]), targets[chunk].unsqueeze(-1)
            logits = self._shaped(raw.float())
            slope = None if not self._softcap else 1 - (logits / self._softcap) ** 2
            logs = F.log_softmax(logits, dim=-1)
            sums.append(F.nll_loss(logs, targets[chunk], reduction="sum"))
            by_logits = logs.exp_().scatter_add_(-1, goal, logs.new_full((1, 1), -1.0).expand_as(goal))
            by_logits = by_logits if slope is None else by_logits.mul_(slope)
            by_logits = by_logits if self._scale == 1 else by_logits.mul_(self._scale)
            gradient[chunk] = by_logits.to(raw.dtype) @ self._head.weight.to(raw.dtype)
        return torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=torch.float32), gradient

    @property
    def rows(self) -> int:
        """How many positions' logits are made at a time."""
        return max(1, LOGITS_CHUNK_BYTES // (4 * self._head.out_features))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32, [n, V], as the LLM's own forward gives them. Not chunked: for few positions."""
        return self._shaped(self._head(hidden).float())

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        if self._scale != 1:
            logits = logits * self._scale
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy against `targets` int64 [n], summed, an fp32 scalar."""
        if torch.is_grad_enabled() and hidden.requires_grad and self.gives_gradient(hidden, len(targets)):
            total: torch.Tensor = _SumOfFrozen.apply(hidden, targets, self)
            return total
        sums = self._in_chunks(self._summed, hidden, targets)
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probability of each of `targets` int64 [n], fp32 [n]."""
        return torch.cat(self._in_chunks(self._logprobs, hidden, targets))

    def _in_chunks(self, score: _Score, hidden: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        calls = self._calls(max(1, math.ceil(len(targets) / self.rows)))
        if calls == 1:
            return [score(hidden, targets)]
        pieces = zip(hidden.tensor_split(calls), targets.tensor_split(calls), strict=True)
        return [checkpoint(score, h, t, use_reentrant=False) for h, t in pieces]

    def _summed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(hidden), targets, reduction="sum")

    def _logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(self.logits(hidden), targets, reduction="none")


class _SumOfFrozen(torch.autograd.Function):
    """Scorer.cross_entropy, whose gradient is there with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, scorer: Scorer) -> torch.Tensor:
        loss, gradient = scorer.loss_and_gradient(hidden, targets)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grads[0]).to(gradient.dtype), None, None


# transformers writes what happens behind the head into each architecture's forward; only some configurations have
# these keys, and there is no common name. The lists were read off the classes ...ForCausalLM of transformers 5.23.


def logits_scale(config: PreTrainedConfig) -> float:
    """The factor that an architecture puts on its logits, before any softcap."""
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(config, key, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    return scale * scaling if config.model_type == "hyperclovax" else scale / scaling


def logits_softcap(config: PreTrainedConfig) -> float | None:
    """The bound that logits are squeezed under by a tanh, None for none."""
    keys = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
    return next((value for key in keys if (value := getattr(config, key, None))), None)
