"""Batch normalisation over a batch that is spread over processes; torch.nn.SyncBatchNorm does not run on CPUs. With the
mean m and the variance v of each channel, over its n values in all processes together,

    x^ = (x - m) / sqrt(v + eps),    y = w x^ + b.

A process has the mean m_p and the variance v_p of its own values. As all have equally many, m = mean_p m_p and v =
mean_p (v_p + (m_p - m)^2), a sum without cancellation. With the gradient g of y,

    db = sum g,    dw = sum g x^,    dx = w / sqrt(v + eps) (g - mean g - x^ mean(g x^)),

the sums over this process's values, the means over those of all. Each pass costs one exchange of two numbers per
channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed import gather_rows, mean_over_processes, world_size


def synchronize(module: nn.Module) -> None:
    """Make every batch normalisation in it one over all processes; parameters, buffers and names do not change.

    Raises:
        ValueError: if it has a batch normalisation of another class than PyTorch's, whose behaviour is not known.
    """
    for name, layer in module.named_modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            layer.__class__ = BatchNorm
        elif isinstance(layer, _BatchNorm) and not isinstance(layer, (BatchNorm, nn.SyncBatchNorm)):
            raise ValueError(f"{name} must be torch.nn.BatchNorm1d, 2d or 3d, got {type(layer).__name__}")


class BatchNorm(_BatchNorm):
    """torch.nn.BatchNorm1d, 2d or 3d, in training mode with the statistics of all processes of the default group.

    All of them must call it, and its backward pass, with inputs of the same shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same, normalised."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        y, mean, variance = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            values = world_size() * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (values / (values - 1)), momentum)
        return y

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"x must have shape (B, C, ...), got {tuple(x.shape)}")


class _Normalize(Function):
    """(y, m, v)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        own_mean = _mean(values)
        own_variance = _mean((values - _spread(own_mean, x)).square_())
        means, variances = gather_rows(torch.stack([own_mean, own_variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        g = g.to(mean.dtype)
        x_hat = F.batch_norm(x.to(mean.dtype), mean, variance, eps=ctx.eps)
        own = torch.stack([_mean(g), _mean(g * x_hat)])
        mean_g, mean_gx = mean_over_processes(own)
        scale = (variance + ctx.eps).rsqrt() if weight is None else weight * (variance + ctx.eps).rsqrt()
        # In place, which is three times as fast: scale (g - mean_g - x_hat mean_gx).
        dx = x_hat.mul_(_spread(-mean_gx, x)).add_(g).sub_(_spread(mean_g, x)).mul_(_spread(scale, x))
        db, dw = (None, None) if weight is None else own * (x.numel() / x.shape[1])
        return dx.to(x.dtype), dw, db, None


def _mean(x: Tensor) -> Tensor:
    """Of each channel."""
    return x.mean([d for d in range(x.dim()) if d != 1])


def _spread(numbers: Tensor, x: Tensor) -> Tensor:
    """(C,), to be broadcast over x."""
    return numbers.view(-1, *[1] * (x.dim() - 2))
