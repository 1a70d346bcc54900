"""What a type checker must find right in a user's script: `python -m mypy` reads this, nothing runs it."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastssl
from fastssl import functional as F
from fastssl import nn

z1, z2 = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
labels = torch.arange(8)

assert_type(F.nt_xent(z1, z2, temperature=0.5), Tensor)
assert_type(F.sup_con(torch.stack([z1, z2], 1), labels), Tensor)
assert_type(F.clip_loss(z1, z2, torch.tensor(10.0), labels=labels), Tensor)
assert_type(F.clip_loss(z1, z2, 10.0, return_metrics=True), tuple[Tensor, dict[str, Tensor]])
assert_type(F.info_nce(z1, z2, return_metrics=False), Tensor)
assert_type(F.barlow_twins(z1, z2), Tensor)
F.vicreg(z1, z2).backward()
loss, metrics = F.vicreg(z1, z2, return_metrics=True)
assert_type(metrics["covariance"], Tensor)
F.nt_xent(z1, "z2")  # type: ignore[arg-type]
F.siglip_loss(z1, z2, logit_scale=10.0, logit_bias=-10.0).backward()

with fastssl.use_backend("portable"):
    criterion = nn.NTXentLoss(temperature=0.2)
    assert_type(criterion.forward(z1, z2), Tensor)
nn.EMA(torch.nn.Linear(2, 2), decay="0.9")  # type: ignore[arg-type]
