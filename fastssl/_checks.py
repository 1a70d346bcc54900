"""The checks of arguments. Each error names the argument, the rule and the value.

A check returns its argument in the form in which the rest takes it: numpy's numbers as Python's, a tensor of one
element as a 0-d one, and tensors that autocast allows to be of unlike dtypes in the widest of theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import distributed
from fastssl.distributed import ProcessGroup
from fastssl.ops import current_backend
from fastssl.ops._fake import is_fake
from fastssl.ops._precision import accumulate_dtype, autocast_enabled

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AUTOCASTABLE = DTYPES[:3]  # float64 goes through autocast as it is
_LARGEST = {dtype: torch.finfo(accumulate_dtype(dtype)).max for dtype in DTYPES}  # number that sums hold


def check_group(group: ProcessGroup | None) -> None:
    if group is not None:
        distributed.check_group(group)
        if current_backend() == "reference":
            raise ValueError(f"group must be None with the backend 'reference', got {group!r}")


# Tensors


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.is_quantized:
        raise ValueError(f"{name} must not be quantized, got {x.dtype}")
    if type(x) in (Tensor, nn.Parameter) and not x.is_meta and x.numel() and not _has_memory(x):
        raise ValueError(f"{name} must have memory, got a tensor whose storage was freed")


def _has_memory(x: Tensor) -> bool:
    """Whether its storage was not freed, as FSDP frees that of parameters. Tracers and torch.func hide it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return x.untyped_storage().nbytes() > 0


def check_not_negated(name: str, x: Tensor) -> None:
    """A kernel that reads or writes its memory needs its value there. Where torch.compile runs, there is none."""
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name} must not be a negated view, as of a conjugate's imaginary part, got one")


def check_tensors(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, as a list."""
    try:
        found = None if isinstance(tensors, Tensor) else list(tensors)
    except TypeError:  # it is not iterable, or as numpy's 0-d arrays says that it is, and is not
        found = None
    if found is None:
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    for i, x in enumerate(found):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] must be a Tensor, got {type(x).__name__}")
    return found


def check_rows(name: str, z: Tensor, shape: str, dims: int = 2) -> None:
    check_tensor(name, z)
    if z.dtype not in DTYPES:
        raise ValueError(f"{name} must have a floating-point dtype of 16, 32 or 64 bits, got {z.dtype}")
    if z.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(z.shape)}")
    if z.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(z.shape)}")


def check_same_device(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    if x1.device != x2.device:
        raise ValueError(f"{name1} and {name2} must be on the same device, got {x1.device} and {x2.device}")
    if type(x1) is not type(x2):
        check_same_kind(name1, x1, name2, x2)


def check_same_kind(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Both with values, or both without: on the meta device, or fake."""
    if type(x1) is type(x2) and x1.is_meta == x2.is_meta:
        return
    kinds = ["a meta tensor" if x.is_meta else "a fake one" if is_fake(x) else "a real one" for x in (x1, x2)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name1} and {name2} must both be meta, fake or real tensors, got {' and '.join(kinds)}")


def check_alike(name1: str, z1: Tensor, name2: str, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype. Under autocast they may be of unlike dtypes: the narrower becomes as wide as the other, which
    loses nothing and copies nothing wide, and its gradient comes back in its own dtype."""
    check_compatible(name1, z1, name2, z2)
    if z1.dtype == z2.dtype:
        return z1, z2
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    return z1.to(dtype), z2.to(dtype)


def check_compatible(name1: str, z1: Tensor, name2: str, z2: Tensor) -> None:
    """On one device, and of one dtype, or under autocast of two."""
    check_same_device(name1, z1, name2, z2)
    if z1.dtype != z2.dtype and not (z1.dtype in _AUTOCASTABLE and z2.dtype in _AUTOCASTABLE and autocast_enabled(z1)):
        raise ValueError(f"{name1} and {name2} must have the same dtype, got {z1.dtype} and {z2.dtype}")


def check_pair(z1: Tensor, z2: Tensor, name1: str = "z1", name2: str = "z2") -> tuple[Tensor, Tensor]:
    check_rows(name1, z1, "(B, D)")
    check_rows(name2, z2, "(B, D)")
    if z1.shape != z2.shape:
        raise ValueError(f"{name1} and {name2} must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    return check_alike(name1, z1, name2, z2)


def check_batch(group: ProcessGroup | None, **views: Tensor) -> None:
    """A loss on columns needs at least two rows, counting those of the other processes of group."""
    rows, (name, z) = 1, next(iter(views.items()))
    if group is not None:
        distributed.check_alike(group, views)
        rows = group.size()
    if rows * z.shape[0] < 2:
        raise ValueError(f"{name} must have at least 2 rows, got shape {tuple(z.shape)}")


def check_features(name1: str, z1: Tensor, name2: str, z2: Tensor) -> None:
    if z1.shape[1] != z2.shape[1]:
        shapes = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        raise ValueError(f"{name1} and {name2} must have the same number of features, got {shapes}")


def check_negatives(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, negative_mode: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All three in one dtype."""
    check_choice("negative_mode", negative_mode, ("unpaired", "paired"))
    if negative_keys is None:
        return query, positive_key, None
    paired = negative_mode == "paired"
    check_rows("negative_keys", negative_keys, "(B, K, D)" if paired else "(K, D)", 3 if paired else 2)
    if negative_keys.shape[-1] != query.shape[1] or (paired and negative_keys.shape[0] != query.shape[0]):
        raise ValueError(
            f"negative_keys must have as many features as query, and with 'paired' as many rows, got"
            f" {tuple(negative_keys.shape)} and {tuple(query.shape)}"
        )
    query, negative_keys = check_alike("query", query, "negative_keys", negative_keys)
    return query, positive_key.to(query.dtype), negative_keys


def check_ids(name: str, ids: Tensor, x: Tensor, name_x: str = "tokens") -> None:
    check_tensor(name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must have dtype torch.int64 or torch.int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must have shape ({x.shape[0]}, K), a row for each sample, got {tuple(ids.shape)}")
    check_same_device(name, ids, name_x, x)


def check_range(name: str, ids: Tensor, end: int | None = None) -> None:
    """What kernels check by themselves, for the reference."""
    wrong = (ids < 0) if end is None else (ids < 0) | (ids >= end)
    if not ids.is_meta and wrong.any():
        rule = "not be negative" if end is None else f"be from 0 to below {end}"
        raise IndexError(f"{name} must {rule}, got {ids[wrong][0].item()}")


def check_lengths(lengths: Tensor, batch: int, length: int, x: Tensor) -> None:
    """How much of each row of (batch, length) is no padding; of the kind that x is."""
    check_same_kind("lengths", lengths, "the result", x)
    if lengths.dtype not in (torch.int64, torch.int32) or lengths.shape != (batch,):
        found = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        raise ValueError(f"lengths must be int64 or int32 of shape ({batch},), got {found}")
    rule = f"lengths must be from 0 to length, {length}"
    wrong = (lengths < 0) | (lengths > length)
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), rule)
    elif wrong.any():
        raise ValueError(f"{rule}, got {lengths[wrong][0]}")


def check_labels(labels: Tensor, x: Tensor, name: str) -> None:
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must have dtype torch.int64, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape ({x.shape[0]},), as {name} has rows, got {tuple(labels.shape)}")
    check_same_device("labels", labels, name, x)


def check_vector(name: str, vector: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, vector)
    if vector.dtype not in dtypes:
        raise ValueError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {vector.dtype}")
    if vector.shape != x.shape[:1]:
        raise ValueError(f"{name} must have one element for each row of x, ({x.shape[0]},), got {tuple(vector.shape)}")
    check_same_device(name, vector, "x", x)


def check_weights(weights: Tensor, x: Tensor) -> Tensor:
    """What weight_fn returned: one for each row of x."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weight_fn must return a Tensor, got {type(weights).__name__}")
    if weights.shape != x.shape[:1] or weights.is_complex():
        found = f"{weights.dtype} of shape {tuple(weights.shape)}"
        raise ValueError(f"weight_fn must return a number for each row, of shape ({x.shape[0]},), got {found}")
    check_same_device("weight_fn's result", weights, "rows", x)
    return weights


class renamed:
    """Errors raised inside name a function's arguments as its caller's users know them: `renamed(old="new")`."""

    def __init__(self, **names: str) -> None:
        self._names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, (TypeError, ValueError)):
            pattern = rf"\b({'|'.join(self._names)})\b"
            raise kind(re.sub(pattern, lambda found: self._names[found[0]], str(error))) from error


# Numbers


def check_number(name: str, number: float, what: str = "a number") -> float:
    number = _number(name, number, what)
    if not -math.inf < number < math.inf:  # torch.compile cannot trace math.isfinite of a number that varies
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_share(name: str, share: float) -> float:
    share = _number(name, share, "a number")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {share}")
    return share


def check_positive_number(name: str, number: float) -> float:
    number = check_number(name, number)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def check_eps(eps: float) -> float:
    return check_not_negative("eps", eps)


def check_value(name: str, scalar: Tensor, check: Callable[[str, float], float]) -> None:
    """What a 0-d tensor holds, if it is on the CPU: nothing waits for a GPU."""
    if scalar.is_cpu and not is_fake(scalar) and not torch.compiler.is_compiling():
        check(name, scalar.item())


def check_not_negative(name: str, number: float) -> float:
    number = check_number(name, number)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number


def check_adamw(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float | Tensor, tuple[float, float], float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    betas = tuple(check_number(f"betas[{i}]", beta) for i, beta in enumerate(betas))
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be from 0 to below 1, got {beta}")
    lr, eps, weight_decay = check_scalar("lr", lr), check_eps(eps), check_not_negative("weight_decay", weight_decay)
    largest = _LARGEST[torch.float32] * (1 - betas[0])  # the first step divides by 1 - betas[0]

    def check_lr(name: str, lr: float) -> None:
        if check_not_negative(name, lr) > largest:
            raise ValueError(f"{name} must be at most {largest:.4g}, what float32 holds times 1 - betas[0], got {lr}")

    if isinstance(lr, Tensor):
        check_value("lr", lr, check_lr)
    else:
        check_lr("lr", lr)
    return lr, betas, eps, weight_decay


def check_scalar(name: str, scalar: float | Tensor, x: Tensor | None = None) -> float | Tensor:
    """A number, which x's dtype of sums must hold, or a 0-d tensor."""
    if isinstance(scalar, Tensor):
        return _check_element(name, scalar, x)
    scalar = check_number(name, scalar, "a number or a tensor of one element")
    if x is not None:
        check_holds(name, scalar, scalar, x)
    return scalar


def check_divisor(name: str, number: float | Tensor) -> float | Tensor:
    number = check_scalar(name, number)
    if not isinstance(number, Tensor) and number == 0:
        raise ValueError(f"{name} must not be zero, got {number}")
    return number


def check_temperature(temperature: float | Tensor, x: Tensor, name: str = "temperature") -> float | Tensor:
    """Likewise; x's dtype of sums must hold its inverse."""
    if isinstance(temperature, Tensor):
        return _check_element(name, temperature, x)
    temperature = check_divisor(name, temperature)
    check_holds(f"1 / {name}", 1 / temperature, temperature, x)
    return temperature


def check_positive_temperature(name: str, temperature: float | Tensor, x: Tensor) -> float | Tensor:
    """Likewise, and above 0; NaN where a tensor, which is not waited for, is not."""
    temperature = check_temperature(temperature, x, name)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(accumulate_dtype(x.dtype))
        return temperature.where(temperature > 0, math.nan)
    if temperature < 0:
        raise ValueError(f"{name} must be positive, got {temperature}")
    return temperature


def _check_element(name: str, scalar: Tensor, x: Tensor | None) -> Tensor:
    check_tensor(name, scalar)
    if scalar.is_complex() or scalar.dtype == torch.bool or scalar.numel() != 1:
        found = f"{scalar.dtype} of shape {tuple(scalar.shape)}"
        raise ValueError(f"{name} must be a number or a tensor of one real element, got {found}")
    if x is not None:
        check_same_kind(name, scalar, "features", x)
    return scalar if scalar.dim() == 0 else scalar.reshape(())


def check_holds(name: str, value: float, number: float, x: Tensor) -> None:
    """x's dtype of sums must hold value, which is made of number."""
    largest = _LARGEST[x.dtype]
    if not -largest <= value <= largest:
        raise ValueError(f"{name} must be finite in {accumulate_dtype(x.dtype)}, got {number}")


def check_memory(name: str, sizes: Iterable[int], bytes_each: int) -> None:
    """A tensor of those sizes, of which `name` is one, must have fewer than 2^63 bytes."""
    if math.prod(sizes) * bytes_each >= 1 << 63:
        raise ValueError(f"{name} must make no tensor of 2^63 bytes or more, got one of shape {tuple(sizes)}")


def check_integer(name: str, number: int) -> int:
    integer = _python_number(number)
    if not _is_integer(integer):
        raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
    if integer >= 1 << 63:
        raise ValueError(f"{name} must be below 2^63, got {integer}")
    if integer < -1 << 63:
        raise ValueError(f"{name} must not be below -2^63, got {integer}")
    return integer


def check_size(name: str, size: int) -> int:
    size = check_integer(name, size)
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {size}")
    return size


def check_positive(name: str, size: int) -> int:
    size = check_integer(name, size)
    if size < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return size


def check_pair_of_sizes(name: str, sizes: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, which are one number where they are equal."""
    pair = sizes if isinstance(sizes, (tuple, list)) else (sizes, sizes)
    pair = [_python_number(size) for size in pair]
    if len(pair) != 2 or not all(map(_is_integer, pair)):
        raise TypeError(f"{name} must be an integer or two, got {sizes!r}")
    if min(pair) < 1:
        raise ValueError(f"{name} must be positive, got {sizes}")
    return pair[0], pair[1]


def check_flag(name: str, flag: bool) -> bool:
    flag = _python_number(flag)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {flag!r}")
    return flag


def check_gather_distributed(gather_distributed: bool) -> bool:
    """Of a loss that lightly has, which says at once that there are no processes to gather from."""
    gather_distributed = check_flag("gather_distributed", gather_distributed)
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError("gather_distributed must be False where torch.distributed is not available, got True")
    return gather_distributed


def _python_number(number: Any) -> Any:
    """numpy's numbers as Python's, whatever else as it is."""
    if isinstance(number, (int, float, Tensor)) or getattr(number, "shape", None) != ():
        return number
    return number.item()


def _number(name: str, number: float, what: str) -> float:
    number = _python_number(number)
    if not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {what}, got {type(number).__name__}")
    if isinstance(number, int) and not -1 << 63 <= number < 1 << 63:  # which PyTorch would not take
        return float(number) if abs(number) < 1 << 1023 else math.inf
    return number


def _is_integer(number: Any) -> bool:
    return isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)


# Others


def check_choice(name: str, choice: str | None, choices: tuple[str | None, ...]) -> None:
    if not isinstance(choice, str | None) or choice not in choices:
        names = " or ".join(filter(None, (", ".join(map(repr, choices[:-1])), repr(choices[-1]))))
        raise ValueError(f"{name} must be {names}, got {choice!r}")


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, ("none", "mean", "sum"))


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {dtype!r}")
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be a floating-point dtype of 16, 32 or 64 bits, got {dtype}")


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


def check_device(device: torch.device | str | int | None) -> torch.device | None:
    if device is None:
        return None
    if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
        raise TypeError(f"device must be a torch.device, its name or None, got {device!r}")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (AssertionError, ImportError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).partition(". ")[0].partition("\n")[0]  # PyTorch may go on for pages
        raise ValueError(f"device must be one that is there, got {device!r}: {reason}") from error
    return device
