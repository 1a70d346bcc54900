"""KoLeo over several processes, which hold unlike numbers of rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastssl.distributed import rank, world_size
from fastssl.functional import koleo_loss
from fastssl.integrations.dinov2 import KoLeoLossDistributed
from tests.distributed.processes import needs_gloo, run_processes, tolerance
from tests.inputs import normal

pytestmark = needs_gloo


def _check_one_batch() -> None:
    """The mean of all rows' losses is that of one process with all rows, and so are the gradients."""
    group = dist.group.WORLD
    counts = [10, 2, 0] if world_size() == 3 else [5, 7]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = normal(12, 40, dtype=dtype)
        for topk, size in ((1, None), (3, 12), (2, 4), (1, 2)):
            whole, own = x.clone().requires_grad_(), x.split(counts)[rank()].clone().requires_grad_()
            expected = koleo_loss(whole.float() if dtype == torch.bfloat16 else whole, topk=topk, group_size=size)
            expected.backward()
            loss = koleo_loss(own, topk=topk, group_size=size, group=group)
            assert loss.dtype == dtype and loss.isnan() == (counts[rank()] == 0)
            share = loss.nan_to_num(0.0) * counts[rank()] / 12
            share.backward()
            dist.all_reduce(total := share.detach().to(expected.dtype))
            close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 0, "atol": tolerance(dtype)}
            torch.testing.assert_close(total, expected.detach(), **close)
            torch.testing.assert_close(own.grad, whole.grad.split(counts)[rank()], **close)


def _check_class_of_dinov3() -> None:
    """Each process's loss is that of its rows, and its gradient that of the sum of all processes' losses."""
    x = normal(12, 40)
    for topk, size in ((1, None), (3, None), (2, 6), (2, 4)):
        whole, own = x.clone().requires_grad_(), x.split(6)[rank()].clone().requires_grad_()
        z, group = F.normalize(whole), torch.arange(12) // (size or 12)
        similarity = (z @ z.T).masked_fill(group[:, None] != group, -2).fill_diagonal_(-2)
        distances = F.pairwise_distance(z[:, None], z[similarity.topk(topk).indices], eps=1e-8)
        losses = -(distances + 1e-8).log().view(2, -1).mean(1)
        losses.sum().backward()
        loss = KoLeoLossDistributed(topk, size)(own)
        loss.backward()
        torch.testing.assert_close(loss, losses[rank()])
        torch.testing.assert_close(own.grad, whole.grad.split(6)[rank()])


def _check_what_is_refused() -> None:
    group, x = dist.group.WORLD, torch.randn(3, 8)
    for other in (torch.randn(3, 8 + rank()), x.double() if rank() else x, x.clone().requires_grad_(rank() == 0)):
        with pytest.raises(ValueError, match="a row of features must have the same shape, dtype, device and requires_"):
            koleo_loss(other, group=group)
    with pytest.raises(ValueError, match="group_size must divide the number of rows of features, 6, got 4"):
        koleo_loss(x, group_size=4, group=group)
    with pytest.raises(ValueError, match="topk must be below the number of rows among which neighbours are, 6, got 6"):
        koleo_loss(x, topk=6, group=group)
    assert koleo_loss(x[:0], group=group).isnan()


@pytest.mark.parametrize(
    "check",
    [_check_one_batch, _check_class_of_dinov3, _check_what_is_refused],
    ids=lambda check: check.__name__[7:],
)
def test_two_processes(check, tmp_path):
    run_processes(check, 2, tmp_path)


def test_three_processes(tmp_path):
    run_processes(_check_one_batch, 3, tmp_path)
