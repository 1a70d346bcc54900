"""The checks of arguments. Each error names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastssl import distributed
from fastssl.distributed import ProcessGroup
from fastssl.ops import current_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_group(group: ProcessGroup | None) -> None:
    if group is not None:
        distributed.check_group(group)
        if current_backend() == "reference":
            raise ValueError(f"group must be None with the backend 'reference', got {group!r}")


def check_pair(z1: Tensor, z2: Tensor, name1: str = "z1", name2: str = "z2") -> None:
    check_rows(name1, z1, "(B, D)")
    check_rows(name2, z2, "(B, D)")
    if z1.shape != z2.shape:
        raise ValueError(f"{name1} and {name2} must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    check_alike(name1, z1, name2, z2)


def check_batch(group: ProcessGroup | None, **views: Tensor) -> None:
    """A loss on columns needs at least two rows, counting those of the other processes of group."""
    rows, (name, z) = 1, next(iter(views.items()))
    if group is not None:
        distributed.check_alike(group, views)
        rows = group.size()
    if rows * z.shape[0] < 2:
        raise ValueError(f"{name} must have at least 2 rows, got shape {tuple(z.shape)}")


def check_tensors(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, as a list."""
    try:
        found = iter(tensors)
    except TypeError:
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}") from None
    found = list(found)
    for i, x in enumerate(found):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] must be a Tensor, got {type(x).__name__}")
    return found


def check_ids(name: str, ids: Tensor, x: Tensor, name_x: str = "tokens") -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must have dtype torch.int64 or torch.int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must have shape ({x.shape[0]}, K), a row for each sample, got {tuple(ids.shape)}")
    if ids.device != x.device:
        raise ValueError(f"{name} and {name_x} must be on the same device, got {ids.device} and {x.device}")


def check_negatives(query: Tensor, negative_keys: Tensor | None, negative_mode: str) -> None:
    if negative_mode not in ("unpaired", "paired"):
        raise ValueError(f"negative_mode must be 'unpaired' or 'paired', got {negative_mode!r}")
    if negative_keys is None:
        return
    paired = negative_mode == "paired"
    check_rows("negative_keys", negative_keys, "(B, K, D)" if paired else "(K, D)", 3 if paired else 2)
    if negative_keys.shape[-1] != query.shape[1] or (paired and negative_keys.shape[0] != query.shape[0]):
        raise ValueError(
            f"negative_keys must have as many features as query, and with 'paired' as many rows, got"
            f" {tuple(negative_keys.shape)} and {tuple(query.shape)}"
        )
    check_alike("query", query, "negative_keys", negative_keys)


def check_labels(labels: Tensor, x: Tensor, name: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must have dtype torch.int64, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape ({x.shape[0]},), as {name} has rows, got {tuple(labels.shape)}")
    if labels.device != x.device:
        raise ValueError(f"labels and {name} must be on the same device, got {labels.device} and {x.device}")


def check_share(name: str, share: float) -> None:
    if not isinstance(share, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(share).__name__}")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {share}")


def check_rows(name: str, z: Tensor, shape: str, dims: int = 2) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(z).__name__}")
    if z.dtype not in _DTYPES:
        raise ValueError(f"{name} must have a floating-point dtype of 16, 32 or 64 bits, got {z.dtype}")
    if z.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(z.shape)}")
    if z.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(z.shape)}")


def check_features(name1: str, z1: Tensor, name2: str, z2: Tensor) -> None:
    if z1.shape[1] != z2.shape[1]:
        shapes = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        raise ValueError(f"{name1} and {name2} must have the same number of features, got {shapes}")


def check_alike(name1: str, z1: Tensor, name2: str, z2: Tensor) -> None:
    if z1.dtype != z2.dtype:
        raise ValueError(f"{name1} and {name2} must have the same dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"{name1} and {name2} must be on the same device, got {z1.device} and {z2.device}")


def check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(vector).__name__}")
    if vector.shape != x.shape[:1]:
        raise ValueError(f"{name} must have one element for each row of x, ({x.shape[0]},), got {tuple(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"{name} and x must be on the same device, got {vector.device} and {x.device}")


def check_temperature(temperature: float | Tensor) -> None:
    check_scalar("temperature", temperature)
    if not isinstance(temperature, Tensor) and temperature == 0:
        raise ValueError(f"temperature must not be zero, got {temperature}")


def check_scalar(name: str, scalar: float | Tensor) -> None:
    if isinstance(scalar, Tensor):
        if scalar.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(scalar.shape)}")
    elif not isinstance(scalar, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(scalar).__name__}")
    elif not -math.inf < scalar < math.inf:  # torch.compile cannot trace math.isfinite of a number that varies
        raise ValueError(f"{name} must be finite, got {scalar}")


def check_size(name: str, size: int) -> None:
    if not isinstance(size, int):
        raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {size}")


def check_positive(name: str, size: int) -> None:
    if not isinstance(size, int):
        raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be positive, got {size}")


def check_pair_of_sizes(name: str, sizes: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, which are one number where they are equal."""
    pair = (sizes, sizes) if isinstance(sizes, int) else sizes
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(size, int) for size in pair):
        raise TypeError(f"{name} must be an integer or two, got {sizes!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be positive, got {sizes}")
    return pair[0], pair[1]


def check_adamw(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be from 0 to below 1, got {beta}")
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        (check_scalar if name == "lr" else check_number)(name, number)
        if not isinstance(number, Tensor) and number < 0:
            raise ValueError(f"{name} must not be negative, got {number}")


def check_number(name: str, number: float) -> None:
    if not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}")
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {number}")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
