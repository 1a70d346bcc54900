"""What holds for InfoNCE in particular."""

from __future__ import annotations

import pytest
import torch

from fastssl.functional import info_nce
from tests.inputs import normal

CONSTANT_KEYS = {
    "in batch": {},
    "smoothed": {"label_smoothing": 0.1},
    "queue": {"negative_keys": (20, 8)},
    "queue and batch": {"negative_keys": (20, 8), "in_batch_negatives": True},
    "paired": {"negative_keys": (9, 3, 8), "negative_mode": "paired"},
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("options", CONSTANT_KEYS.values(), ids=CONSTANT_KEYS)
def test_constant_keys_may_move_on_before_the_backward_pass(options, normalize, backend):
    q, keys = normal(9, 8).requires_grad_(), [normal(9, 8, seed=1)]
    if shape := options.get("negative_keys"):
        keys.append(normal(9, 24, seed=2).view(shape) if len(shape) == 3 else normal(*shape, seed=2))
    options = {name: value for name, value in options.items() if name != "negative_keys"}

    def loss() -> torch.Tensor:
        return info_nce(q, *keys, normalize=normalize, **options)

    (expected,) = torch.autograd.grad(loss(), q)
    output = loss()
    for x in keys:
        x.fill_(7)
    torch.testing.assert_close(torch.autograd.grad(output, q)[0], expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_keys_that_the_backward_pass_reads_may_not(symmetric, kernels):
    q, k = normal(9, 8).requires_grad_(), normal(9, 8, seed=1).requires_grad_()
    for key in (k, k.detach().clone()) if symmetric else (k,):
        output = info_nce(q, key, normalize=False, symmetric=symmetric)
        with torch.no_grad():
            key.fill_(7)
        with pytest.raises(RuntimeError, match="modified"):
            output.backward()


def test_a_second_derivative_wants_the_keys(kernels):
    q, k = normal(9, 8).requires_grad_(), normal(9, 8, seed=1)
    output = info_nce(q, k)
    k.fill_(7)
    with pytest.raises(RuntimeError, match="positive_key was modified in place.*second derivative"):
        torch.autograd.grad(output, q, create_graph=True)
