"""AdamW and LARS as the methods' papers use them: without weight decay of biases and of normalisation layers."""

from __future__ import annotations

import torch
from torch import nn

from fastssl.train.method import Method

OPTIMIZERS = ("adamw", "lars")


def defaults(name: str, method: Method, batch_size: int) -> tuple[float, float]:
    """Learning rate and weight decay: with AdamW the method's own, with LARS those of SimCLR (arXiv:2002.05709)."""
    return (0.3 * batch_size / 256, 1e-6) if name == "lars" else (method.learning_rate, method.weight_decay)


def make_optimizer(name: str, module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser `name` of all of the module's parameters that require gradients.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {name!r}")
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return {"adamw": torch.optim.AdamW, "lars": LARS}[name](groups, learning_rate)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888): momentum, with steps as long as each layer's weights are.

        g = gradient + weight_decay w;    velocity = momentum velocity + trust |w| / |g| g;    w = w - lr velocity

    Parameters of one dimension or none, biases and normalisation layers, take plain g.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        momentum: the share of the velocity that stays.
        weight_decay: times w, added to the gradient.
        trust: a step's length at lr 1, as a share of |w|.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad + group["weight_decay"] * w
                if w.dim() > 1:
                    w_norm, g_norm = w.norm(), g.norm()
                    g *= torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
                if not self.state[w]:
                    self.state[w]["velocity"] = torch.zeros_like(w)
                velocity = self.state[w]["velocity"]
                velocity.mul_(group["momentum"]).add_(g)
                w.sub_(velocity, alpha=group["lr"])
