"""A queue of keys: csrc/cuda/memory_bank.cu."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.gpu.cuda_host.common.operations import DTYPES, assert_launches, cuda, layouts, portable


@pytest.mark.parametrize(
    "size, count, dim, start", [(7, 3, 5, 5), (7, 7, 33, 0), (5, 12, 64, 3), (3, 0, 4, 1), (1, 1, 1, 0)]
)
def test_enqueue(size, count, dim, start):
    for target, (source, layout) in itertools.product(DTYPES, zip(DTYPES, range(4), strict=True)):
        memory = torch.full((size + 2, dim + 1), math.nan, dtype=target)
        new_keys = layouts(count, dim, dtype=source)[layout]
        for normalize in (False, True):
            keys, position = memory[1:-1, 1:], torch.tensor(start)
            keys.copy_(torch.randn(size, dim))
            expected = []
            for dtype in (torch.float64, target):
                expected.append(keys.to(dtype, copy=True))
                given = new_keys.to(torch.promote_types(dtype, source))
                portable.enqueue_portable_(expected[-1], position.clone(), given, normalize)
            cuda.enqueue_(keys, position, new_keys, normalize)
            assert position == (start + count) % size
            error, allowed = ((x.double() - expected[0]).abs().max().item() for x in (keys, expected[1]))
            assert error <= 2 * allowed + 1e-6
            assert memory[0].isnan().all() and memory[-1].isnan().all() and memory[:, 0].isnan().all()


def test_launches():
    assert_launches("enqueue_", torch.ones(9, 3), torch.tensor(4), torch.ones(20, 3), True)


def test_enqueue_zeros_and_keys_of_the_queue_itself():
    keys, position = torch.arange(1.0, 9).view(4, 2), torch.tensor(3)
    cuda.enqueue_(keys, position, keys[2:], False)
    assert keys.tolist() == [[7, 8], [3, 4], [5, 6], [5, 6]] and position == 1
    cuda.enqueue_(keys, position, torch.zeros(1, 2), True)
    assert keys[1].tolist() == [0, 0] and position == 2


@pytest.mark.parametrize(
    "keys, position, new_keys, match",
    [
        ((4, 3), 0, (2, 4), r"new_keys must have shape \(B, D\).*got \[2, 4\] and \[4, 3\]"),
        ((4, 3), 0.0, (2, 3), "position must be one int64, got Float"),
        ((0, 3), 0, (2, 3), "keys must have at least one row"),
    ],
)
def test_bad_queue(keys, position, new_keys, match):
    with pytest.raises(ValueError, match=match):
        cuda.enqueue_(torch.ones(keys), torch.tensor(position), torch.ones(new_keys), True)
