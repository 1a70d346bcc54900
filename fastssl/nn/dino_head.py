"""The projection head of DINO, iBOT and DINOv2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastssl._checks import check_flag, check_memory, check_positive, check_same_kind, check_size, check_tensor
from fastssl.ops._precision import autocast_enabled


class DINOHead(nn.Module):
    """The projection head of DINO (arXiv:2104.14294): an MLP down to a bottleneck of unit length, whose similarities
    with K prototypes of unit length are the logits. It takes the place of the class of this name in DINO's and DINOv2's
    code, and loads their state_dicts.

    The loss need not see logits: `prototype_distillation_loss(head.features(x), head.prototypes, ...)` computes a block
    of them at a time.

    Attributes: as the arguments, `mlp`, and `last_layer`, of weight `prototypes`.

    Args:
        in_dim: features of the backbone.
        out_dim: the number K of prototypes.
        use_bn: batch normalisation after each layer of the MLP but the last.
        norm_last_layer: keep the prototypes at unit length; False: their lengths are learned.
        nlayers: of the MLP, at least 1.
        hidden_dim: of its inner layers.
        bottleneck_dim: of its output.
        mlp_bias: whether its layers have biases.
        freeze_last_layer: the number of epochs for which `cancel_last_layer_gradients` keeps the prototypes.

    Raises:
        TypeError, ValueError: if a size is no positive integer, or a flag neither True nor False.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
        freeze_last_layer: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim, "out_dim": out_dim}
        for name, size in {**sizes, "nlayers": nlayers}.items():
            check_positive(name, size)
        check_memory("hidden_dim", (hidden_dim, max(in_dim, hidden_dim, bottleneck_dim)), 4)
        check_memory("out_dim", (out_dim, bottleneck_dim), 4)
        check_memory("bottleneck_dim", (bottleneck_dim, max(in_dim, hidden_dim)), 4)
        check_memory("in_dim", (in_dim, hidden_dim), 4)
        for name, flag in (("use_bn", use_bn), ("norm_last_layer", norm_last_layer), ("mlp_bias", mlp_bias)):
            check_flag(name, flag)
        use_bn = bool(use_bn)
        self.freeze_last_layer = check_size("freeze_last_layer", freeze_last_layer)
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers.append(nn.Linear(before, after, bias=mlp_bias))
            nn.init.trunc_normal_(layers[-1].weight, std=0.02)
            if mlp_bias:
                nn.init.zeros_(layers[-1].bias)
            if i < nlayers - 1:
                layers += [nn.BatchNorm1d(after)] * use_bn + [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.last_layer = parametrizations.weight_norm(last_layer)
        lengths = self.last_layer.parametrizations.weight.original0
        with torch.no_grad():
            lengths.fill_(1)
        lengths.requires_grad_(not norm_last_layer)

    @property
    def prototypes(self) -> Tensor:
        """(K, bottleneck_dim), of unit length with norm_last_layer."""
        return self.last_layer.weight

    def features(self, x: Tensor) -> Tensor:
        """(..., bottleneck_dim) of unit length, of (..., in_dim)."""
        check_tensor("x", x)
        like = next(self.mlp.parameters())
        if x.shape[-1:] != like.shape[-1:]:
            raise ValueError(f"x must have in_dim, {like.shape[-1]}, features, got shape {tuple(x.shape)}")
        if x.dtype != like.dtype and not autocast_enabled(x):
            raise ValueError(f"x must have the parameters' dtype, {like.dtype}, got {x.dtype}")
        check_same_kind("x", x, "the parameters", like.detach())
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., K) of (..., in_dim)."""
        return self.last_layer(self.features(x))

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Between the backward pass and the optimiser's step: leave the prototypes as they are in the first
        freeze_last_layer epochs, counted from 0."""
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None
