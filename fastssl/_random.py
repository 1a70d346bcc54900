"""The seed that everything random is drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._checks import check_device, check_generator


def draw_seed(generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    """0-d int64, from the generator, or from PyTorch's default one of the CPU; on the device, or on the generator's."""
    check_generator(generator)
    device = check_device(device)
    source = generator.device if generator is not None else torch.device("cpu")
    seed = torch.randint(1 << 62, (), generator=generator, device=source)
    return seed.to(device or source, non_blocking=source.type == "cpu")  # a GPU need not be waited for
