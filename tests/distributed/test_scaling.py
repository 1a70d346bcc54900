"""What the model in docs/scaling.py counts, and what processes really multiply and send."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import fastssl
from fastssl.distributed import ring, world_size
from fastssl.functional import clip_loss, siglip_loss
from tests.distributed.processes import needs_gloo, run_processes

DOCS = Path(__file__).parents[2] / "docs"
ROWS, FEATURES = 6, 8
model = runpy.run_path(str(DOCS / "scaling.py"))


def _flops(event: Any) -> int:
    """Of a product."""
    factors = {"aten::mm": slice(0, 2), "aten::addmm_": slice(1, 3), "aten::addmm": slice(1, 3)}.get(event.name)
    if factors is None:
        return 0
    (rows, inner), (_, columns) = event.input_shapes[factors]
    return 2 * rows * inner * columns


def _check(dtypes: tuple[torch.dtype, ...]) -> None:
    sent = 0
    batch = ring.dist.batch_isend_irecv

    def counted(ops):
        nonlocal sent
        sent += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return batch(ops)

    ring.dist.batch_isend_irecv = counted
    group, processes = dist.group.WORLD, world_size()
    for dtype in dtypes:
        for name, loss in (("clip_loss", clip_loss), ("siglip_loss", siglip_loss)):
            x, y = (torch.randn(ROWS, FEATURES).to(dtype).requires_grad_() for _ in range(2))
            scalars = (1.0,) if name == "clip_loss" else (1.0, -1.0)
            sent = 0
            with fastssl.use_backend("portable"), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as ran:
                loss(x, y, *scalars, group=group).backward()
            assert sum(map(_flops, ran.events())) == model["flops"](name, ROWS, FEATURES, processes), name
            assert sent == model["bytes_sent"](name, ROWS, FEATURES, processes, dtype.itemsize), name


@needs_gloo
@pytest.mark.parametrize("processes", [1, 4])
def test_counts_are_what_processes_do(processes, tmp_path):
    run_processes(functools.partial(_check, (torch.float32, torch.bfloat16)), processes, tmp_path)


def test_the_page_has_the_models_tables():
    page = (DOCS / "scaling.md").read_text()
    assert "\n".join(model["tables"]()) in page


def test_estimates():
    step, H100 = model["step"], model["H100"]
    alone, together = (step(H100, "clip_loss", 1 << 18, 512, p) for p in (1, 8))
    assert alone.exposed == 0 and 7 < alone.loss / together.loss < 8  # work falls with the number of processes
    rows = model["hides_from"](H100, "siglip_loss", H100.nvlink)
    hidden, shown = (step(H100, "siglip_loss", 8 * r, 512, 8) for r in (2 * rows, rows // 8))
    assert hidden.exposed / hidden.loss < shown.exposed / shown.loss
