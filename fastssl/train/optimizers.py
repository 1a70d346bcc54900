"""AdamW and LARS as the methods' papers use them: without weight decay of biases and of normalisation layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastssl.train.fsdp import is_sharded
from fastssl.train.method import Method

OPTIMIZERS = ("adamw", "lars")


def defaults(name: str, method: Method, batch_size: int) -> tuple[float, float, float]:
    """Learning rate, weight decay at first and at the end: with AdamW the method's own, with LARS those of SimCLR
    (arXiv:2002.05709)."""
    if name == "lars":
        return 0.3 * batch_size / 256, 1e-6, 1e-6
    final = method.final_weight_decay
    return method.learning_rate, method.weight_decay, method.weight_decay if final is None else final


def check_optimizer(name: str, layer_decay: float) -> None:
    """Raises ValueError if the name is unknown, or layer_decay is not in (0, 1]."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {name!r}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")


def make_optimizer(
    name: str, module: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """The optimiser `name` of all of the module's parameters that require gradients.

    Args:
        name: of OPTIMIZERS.
        module: with layer_decay a method whose encoder has `stages()`.
        learning_rate: the highest.
        weight_decay: of matrices. Their groups have "decays": True, for whoever changes their "weight_decay".
        layer_decay: stage l of the encoder's n, counted from 0, has the share layer_decay^(n - l) of the learning rate,
            and everything else the whole (BEiT, arXiv:2106.08254). The share is the group's "scale", to be multiplied
            into its "lr" by whoever sets that.

    Raises:
        ValueError: as `check_optimizer` does, or if there are no stages to tell apart.
    """
    check_optimizer(name, layer_decay)
    if layer_decay != 1 and not hasattr(module.encoder, "stages"):
        raise ValueError(f"layer_decay must be 1 with an encoder that has no stages(), got {layer_decay}")
    stages = module.encoder.stages() if layer_decay != 1 else []
    scales = {p: layer_decay ** (len(stages) - place) for place, stage in enumerate(stages) for p in stage.parameters()}
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            groups.setdefault((scales.get(p, 1.0), p.dim() > 1, is_sharded(p)), []).append(p)
    return {"adamw": partial(torch.optim.AdamW, fused=_can_be_fused(module)), "lars": LARS}[name](
        [
            {
                "params": params,
                "weight_decay": weight_decay * decays,
                "decays": decays,
                "scale": scale,
                "lr": scale * learning_rate,
            }
            for (scale, decays, _), params in groups.items()
        ],
        learning_rate,
    )


def _can_be_fused(module: nn.Module) -> bool:
    """Whether torch.optim.AdamW has one kernel for all, which leaves out a step whose gradients are infinite."""
    return all(p.device.type in ("cpu", "cuda") for p in module.parameters())


def state_like(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Tensors of the names, dtypes and shapes of those that the optimiser keeps of a parameter."""
    one = nn.Parameter(torch.zeros(2, 3))
    one.grad = torch.zeros_like(one)
    tried = type(optimizer)([one], lr=0.0)
    tried.step()
    return {
        name: torch.empty_like(parameter if kept.shape == one.shape else kept)
        for name, kept in tried.state[one].items()
    }


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888): momentum, with steps in proportion to the norm of each
    layer's weights.

        g = gradient + weight_decay w;    velocity = momentum velocity + trust |w| / |g| g;    w = w - lr velocity

    Parameters with fewer than two dimensions, those of biases and normalisation layers, use plain g. If torch.amp's
    GradScaler, or another, sets the attribute found_inf, a tensor, to a number that is not 0, a step does nothing.

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

    _step_supports_amp_scaling = True  # so that GradScaler sets found_inf, and does not wait to read it

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
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
                if found_inf is None:
                    velocity.mul_(group["momentum"]).add_(g)
                    w.sub_(velocity, alpha=group["lr"])
                else:
                    velocity.copy_(torch.where(found_inf == 0, group["momentum"] * velocity + g, velocity))
                    w.copy_(torch.where(found_inf == 0, w - group["lr"] * velocity, w))
