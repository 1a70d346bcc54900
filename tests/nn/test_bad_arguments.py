"""What modules are made of and called with, where it is wrong: the error names the argument, the rule and the value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastssl.nn import (
    EMA,
    BarlowTwinsLoss,
    ClipLoss,
    CoCaLoss,
    DCLLoss,
    DCLWLoss,
    MemoryBank,
    MemoryBankModule,
    NTXentLoss,
    PatchEmbed,
    SigLipLoss,
    SupConLoss,
    VICRegLoss,
)

X, Y = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
LOGITS, TOKENS = torch.zeros(8, 3, 5), torch.ones(8, 3, dtype=torch.int64)

NUMBERS = {
    "temperature": [
        lambda value: NTXentLoss(value),
        lambda value: NTXentLoss(value, (8, 16)),
        lambda value: DCLLoss(value),
        lambda value: SupConLoss(value),
        lambda value: SupConLoss(value, "one"),
    ],
    "sigma": [lambda value: DCLWLoss(sigma=value)],
    "base_temperature": [lambda value: SupConLoss(0.1, "all", value)],
    "lambda_param": [lambda value: BarlowTwinsLoss(value), lambda value: VICRegLoss(value)],
    "mu_param": [lambda value: VICRegLoss(mu_param=value)],
    "nu_param": [lambda value: VICRegLoss(nu_param=value)],
    "eps": [lambda value: VICRegLoss(eps=value)],
    "caption_loss_weight": [lambda value: CoCaLoss(value, 1.0)],
    "clip_loss_weight": [lambda value: CoCaLoss(1.0, value)],
    "logit_scale": [lambda value: ClipLoss()(X, Y, value), lambda value: SigLipLoss()(X, Y, value, 0.0)],
    "logit_bias": [lambda value: ClipLoss()(X, Y, 2.0, value), lambda value: SigLipLoss()(X, Y, 2.0, value)],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    for call in NUMBERS[name]:
        for value in ("a", [0.5], 1j, *([] if name == "logit_bias" else [None])):
            with pytest.raises(TypeError, match=rf"^{name} must be a number"):
                call(value)
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^{name} must be finite, got {value}"):
                call(value)
        call(np.float32(0.5))
        if name in ("temperature", "sigma", "base_temperature"):
            with pytest.raises(ValueError, match=rf"^{name} must (not be zero|be at least 1e-8 in magnitude), got 0"):
                call(0)


def test_a_temperature_that_becomes_zero():
    labels = torch.arange(8) // 2
    features = torch.stack([X, Y], 1)
    for loss, args in (
        (NTXentLoss(), (X, Y)),
        (NTXentLoss(0.5, (8, 16)), (X, Y)),
        (DCLLoss(), (X, Y)),
        (SupConLoss(), (features, labels)),
        (SupConLoss(contrast_mode="one"), (features, labels)),
    ):
        loss.temperature = 0.0
        with pytest.raises(ValueError, match="^temperature must not be zero, got 0.0"):
            loss(*args)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(
            ("gather_distributed", lambda value, module=module: module(gather_distributed=value))
            for module in (NTXentLoss, DCLLoss, DCLWLoss, BarlowTwinsLoss, VICRegLoss)
        ),
        ("gather_distributed", lambda value: MemoryBank(8, 16, value)),
        ("gather_distributed", lambda value: MemoryBankModule(0, value)),
        ("feature_dim_first", lambda value: MemoryBankModule(0, feature_dim_first=value)),
        ("normalize", lambda value: MemoryBank(8, 16, normalize=value)),
    ],
)
def test_flags(name, call):
    for value in (None, 1, "False"):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, got {value!r}"):
            call(value)
    call(np.bool_(False))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: MemoryBank(True, 16), TypeError, "size must be an integer, got bool"),
        (lambda: MemoryBankModule((8, True)), TypeError, "size must be an integer, got bool"),
        (
            lambda: MemoryBank(8, 16, dtype=torch.int64),
            ValueError,
            "dtype must be a floating-point .*torch.int64",
        ),
        (lambda: MemoryBank(8, 2**62), ValueError, r"size x dim must make no tensor of 2\^63 bytes or more"),
        (lambda: MemoryBank(8, 16, dtype="float32"), TypeError, "dtype must be a torch.dtype or None, got 'float32'"),
        (lambda: ClipLoss(use_horovod=torch.ones(2)), TypeError, "use_horovod must be True or False"),
        (lambda: ClipLoss(rank=0.5), TypeError, "rank must be an integer, got float"),
        (lambda: SigLipLoss(world_size=0), ValueError, "world_size must be positive, got 0"),
        (lambda: SigLipLoss()(X, Y, 2.0, None, "yes"), TypeError, "output_dict must be True or False, got 'yes'"),
        (lambda: DCLLoss()(X, 3), TypeError, "out1 must be a Tensor, got int"),
        (lambda: NTXentLoss()(3, X), TypeError, "out0 must be a Tensor, got int"),
        (lambda: EMA(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), TypeError, "momentum must be a number, got Linear"),
        (lambda: PatchEmbed(8, 4, bias=1), TypeError, "bias must be True or False, got 1"),
        (lambda: PatchEmbed(8, 4, norm_layer=lambda *_, **__: None), TypeError, "norm_layer must return a Module"),
        (lambda: MemoryBank(8, 16, device="cpux"), ValueError, "device must be one that is there, got 'cpux'"),
        (lambda: MemoryBank(8, 16).update([1.0]), TypeError, "keys must be a Tensor, got list"),
        (lambda: MemoryBank(8, 16).update(X.long()), ValueError, "keys must have a floating-point dtype"),
        (lambda: MemoryBankModule((8, 16)).update(X.to_sparse()), ValueError, "output must be a dense tensor"),
        (lambda: SupConLoss(contrast_mode="two"), ValueError, "contrast_mode must be 'all' or 'one', got 'two'"),
        (lambda: CoCaLoss(1, 1)(X, Y, None, TOKENS, 2.0), TypeError, "logits must be a Tensor, got NoneType"),
        (lambda: CoCaLoss(1, 1)(X, Y, LOGITS[0], TOKENS, 2.0), ValueError, r"logits must have shape \(B, L, V\), got"),
        (lambda: CoCaLoss(1, 1)(X, Y, LOGITS, TOKENS.float(), 2.0), ValueError, "labels must be int64 .*torch.float32"),
        (
            lambda: CoCaLoss(1, 1)(X, Y, LOGITS, TOKENS[:, 1:], 2.0),
            ValueError,
            r"labels must be .*\(8, 3\).*8, 2",
        ),
        (
            lambda: PatchEmbed(8, 4, norm_layer=3),
            TypeError,
            "norm_layer must be a function .* or None, got 3",
        ),
    ],
)
def test_others(call, error, match):
    with pytest.raises(error, match=f"^{match}"):
        call()


def test_numbers_of_numpy_are_numbers():
    assert MemoryBank(np.int64(8), np.int32(4)).keys.shape == (8, 4)
    assert MemoryBankModule((np.int64(8), 4)).bank.shape == (8, 4)
    assert NTXentLoss(np.float64(0.5), np.int64(0))(X, Y) == NTXentLoss(0.5)(X, Y)
