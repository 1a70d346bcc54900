"""Sinkhorn-Knopp and the center of a teacher over several processes, which hold unlike numbers of rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.distributed import rank, world_size
from fastssl.functional import sinkhorn_center, sinkhorn_knopp, update_center_
from tests.distributed.processes import needs_gloo, run_processes

pytestmark = needs_gloo


def _parts(scale: float = 0.3) -> list[Tensor]:
    """5 rows of the first process, 0 of the second, then 9, 11 ...; those of the last are far below the others."""
    generator = torch.Generator().manual_seed(0)
    parts = [scale * torch.randn(5 + 2 * r if r != 1 else 0, 70, generator=generator) for r in range(world_size())]
    parts[-1] -= 100 * scale
    return parts


def _check_one_batch() -> None:
    for scale in (0.3, 300.0):
        parts, group = _parts(scale), dist.group.WORLD
        for iterations in (1, 3):
            expected = sinkhorn_center(torch.cat(parts).double(), iterations=iterations)
            center = sinkhorn_center(parts[rank()], iterations=iterations, group=group)
            torch.testing.assert_close(center.double(), expected, rtol=1e-5, atol=1e-5)
        expected = sinkhorn_knopp(torch.cat(parts)).split([len(x) for x in parts])[rank()]
        torch.testing.assert_close(sinkhorn_knopp(parts[rank()], group=group), expected, rtol=1e-2, atol=1e-5)
        center, expected = torch.ones(70), torch.ones(70)
        update_center_(expected, torch.cat(parts))
        update_center_(center, parts[rank()], group=group)
        torch.testing.assert_close(center, expected)
    update_center_(center, parts[0][:0], group=group)
    torch.testing.assert_close(center, expected)
    assert sinkhorn_center(parts[0][:0], group=group).isnan().all()


def _check_unlike_rows() -> None:
    for other in (torch.zeros(3, 8 + rank()), torch.zeros(3, 8).to(torch.float64 if rank() else torch.float32)):
        with pytest.raises(ValueError, match="a row of teacher_logits must have the same shape, dtype"):
            sinkhorn_center(other, group=dist.group.WORLD)
        with pytest.raises(ValueError, match="a row of teacher_logits must have the same shape, dtype"):
            update_center_(torch.zeros(other.shape[1]), other, group=dist.group.WORLD)


@pytest.mark.parametrize("check", [_check_one_batch, _check_unlike_rows], ids=lambda check: check.__name__[7:])
def test_two_processes(check, tmp_path):
    run_processes(check, 2, tmp_path)


def test_three_processes(tmp_path):
    run_processes(_check_one_batch, 3, tmp_path)
