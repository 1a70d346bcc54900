"""What holds for uniformity in particular."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastssl.functional import uniformity
from tests.inputs import normal


def test_uniformity_of_fewer_than_two_rows_is_nan(backend):
    for rows in (0, 1):
        assert uniformity(normal(rows, 8)).isnan()


def test_uniformity_of_one_direction_is_zero(backend):
    """Whatever the lengths, and without the rounding of a logarithm of the number of rows."""
    x = normal(1, 8) * torch.logspace(-3, 3, 200)[:, None]
    for t in (2.0, 50.0):
        assert uniformity(x, t=t).abs() < 4 * t * torch.finfo(torch.float32).eps


def test_uniformity_is_the_authors(backend):
    """Theirs is of the distances that `torch.pdist` gives."""
    x = normal(200, 16)
    expected = torch.pdist(F.normalize(x.double())).square().mul(-2).exp().mean().log()
    torch.testing.assert_close(uniformity(x).double(), expected, rtol=1e-6, atol=0)
