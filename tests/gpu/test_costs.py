"""What docs/gpu.py counts, and what the page says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastssl.kernels import koleo  # noqa: E402
from tests.gpu.cuda_host.common.operations import LAUNCHES  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
model = runpy.run_path(str(DOCS / "gpu.py"))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="before PyTorch 2.13 ldexp is two operations")
def test_the_page_has_the_models_tables():
    page = (DOCS / "gpu.md").read_text()
    for table in model["tables"]():
        assert table in page


def test_rates_are_those_of_many_gpus():
    gpu = runpy.run_path(str(DOCS / "scaling.py"))["H100"]
    assert (gpu.flops, gpu.memory) == (model["TENSOR"], model["MEMORY"])


def test_launches_are_those_that_kernels_make():
    moves = model["MOVES"]
    assert {name: move.launches for name, move in moves.items()} == {name: LAUNCHES[name] for name in moves}
    assert set(LAUNCHES) - set(moves) == {"masked_feature_loss_backward"}  # as masked_patch_loss_backward


@pytest.mark.parametrize("dim, units", [(128, (1, 4, 2, 2, 1 / 2, 2)), (512, (1, 3, 3, 2, 1 / 2, 1.5))])
def test_products_are_those_of_the_page(dim, units):
    """In units of 2 N N D, but for what blocks and tiles on the diagonal take besides."""
    losses, work = model["losses_of_pairs"](8192, dim), iter(units)
    for name in ("clip_loss", "info_nce", "nt_xent"):
        for launches in losses[f"`{name}`"]:
            share = sum(w.flops for w in launches) / (2 * 8192**2 * dim)
            assert 0 <= share - next(work) < 0.13, name


def test_bytes_are_those_of_the_arguments():
    """Once each; of the same tensor twice, once."""
    z = torch.empty(256, 64, device="meta")
    with model["counted"]() as work:
        koleo.nearest_rows(z, 0, 256, 1, 256)
    assert [w.bytes for w in work] == [256 * 8, 256 * 64 * 4 + 256 * 8, 2 * 256 * 8, 2 * 256 * 8]
