"""Exponential moving averages, as training scripts write them (MoCo, arXiv:1911.05722; BYOL, arXiv:2006.07733), and
AdamW's step before them (arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor) -> None:
    """target = momentum target + (1 - momentum) source, of every pair; what is equal stays as it is, infinity too."""
    for target, source in zip(targets, sources, strict=True):
        if momentum == 0:
            target.copy_(source)
        elif momentum != 1:
            average = momentum * target + (1 - momentum) * source
            target.copy_(torch.where(target == source, target, average))


@torch.no_grad()
def adamw_ema_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema_params: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum: float | Tensor,
) -> None:
    """Algorithm 2 of the paper, in every parameter, then the moving averages."""
    beta1, beta2 = betas
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        exp_avg.copy_(exp_avg + (1 - beta1) * (grad - exp_avg))
        exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * grad**2)
        mean, square = exp_avg / (1 - beta1 ** step.item()), exp_avg_sq / (1 - beta2 ** step.item())
        param.copy_((1 - lr * weight_decay) * param - lr * mean / (square.sqrt() + eps))
    ema_update_(ema_params, params, momentum)
