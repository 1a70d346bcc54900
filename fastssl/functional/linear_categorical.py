"""Drawing from the softmax of a linear layer's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._arithmetic import inverse
from fastssl._checks import check_positive_temperature
from fastssl._random import draw_seed
from fastssl.functional.linear_cross_entropy import check_layer
from fastssl.ops import linear_categorical as ops
from fastssl.ops._fake import mode_of
from fastssl.ops._precision import product_precision


def linear_categorical(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A class of each row, drawn from the softmax of a linear layer's logits over a temperature: the tokens with which
    ELECTRA's generator replaces what was masked (arXiv:2003.10555), or the next token of a language model.

    As `torch.distributions.Categorical(logits=F.linear(input, linear_weight, linear_bias) / temperature).sample()`, but
    logits are computed for some rows at a time, and never stored as a whole: the class is the one whose logit plus
    Gumbel noise is the largest. One seed is drawn from the generator; the noise that follows from it is the same on
    every device, and so are the classes, but where rounding decides between two. There are no gradients.

    Args:
        input: (..., D) features; float32, bfloat16, float16 or float64.
        linear_weight: (V, D), a row for each of V words or classes, of input's dtype and device.
        linear_bias: (V,), added to the logits, of input's dtype and device; minus infinity for classes that
            are not to be drawn.
        temperature: positive, divides the logits: a number, or a 0-d tensor.
        generator: the source of randomness; None: PyTorch's default one of the CPU. torch.compile cannot trace one.

    Returns:
        (...) int64, from 0 to below V; -1 for a row that has no distribution: a logit is NaN, or none is above minus
        infinity.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes, dtypes or devices do not fit, or temperature is a number that is not finite and positive
            (a tensor that is not positive draws -1).
    """
    check_layer(input, linear_weight, linear_bias)
    temperature = check_positive_temperature("temperature", temperature, input)
    x, w = input.detach().reshape(-1, input.shape[-1]), linear_weight.detach()
    bias = w.new_empty(0) if linear_bias is None else linear_bias.detach()
    scale = inverse(temperature, input).detach().reshape(1)
    with mode_of(input):
        seed = draw_seed(generator, input.device)
    return ops.linear_categorical(seed, x, w, bias, scale, product_precision(input)).view(input.shape[:-1])
