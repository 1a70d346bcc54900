"""Networks whose weights are shared out among the processes (FSDP, arXiv:2304.11277): torch.distributed.fsdp's
`fully_shard`, layer by layer.

Of every Transformer layer, the teacher's too, a process keeps its share of the weights, of their gradients, and of what
the optimiser keeps of them; the whole is gathered for the time that the layer takes. All other weights, those of heads,
embeddings and normalisation, are whole in every process: they are also read outside of `forward`, by losses and by
`after_step`, where `fully_shard` leaves a process its share of them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastssl.distributed import sum_over_processes, world_size
from fastssl.train.networks import models, transformer, vit


def check(name: str, module: nn.Module, amp: bool | str) -> None:
    """Raises ValueError if the module of that name cannot be shared out, or not in a run with that `amp`."""
    if world_size() == 1:
        raise ValueError("fsdp needs several processes, such as torchrun starts, got 1")
    if next(_layers(module), None) is None:
        raise ValueError(f"fsdp needs a method that has Transformer layers, got {name}")
    if amp == "float16":
        raise ValueError(f"fsdp needs bfloat16 or no amp, got {amp!r}")


def shard(module: nn.Module, device: torch.device) -> None:
    """Shares out its layers, in place. Its parameters are others then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in list(_layers(module)):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(part, (vit.Layer, transformer.Layer)):
            yield part
        elif isinstance(part, models.Timm):
            yield from getattr(part.model, "blocks", ())


def is_sharded(x: Any) -> bool:
    """Whether it is a DTensor, of which this process has a share."""
    return hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """This process's share, or all of what is not shared out, in the same memory."""
    return x.to_local() if is_sharded(x) else x


def whole(state: Any) -> Any:
    """A state_dict with whole tensors in place of shares, on the CPU. All processes must call this."""
    return tree_map_only(Tensor, lambda x: x.full_tensor().cpu() if is_sharded(x) else x, state)


def as_share_of(x: Tensor, like: Tensor) -> Tensor:
    """What all processes have, shared out as `like` is, or as it is."""
    if not is_sharded(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def norms(tensors: list[Tensor]) -> Tensor:
    """Of each of them the norm of the whole."""
    found = list(torch._foreach_norm([local(x) for x in tensors]))
    places = [place for place, x in enumerate(tensors) if is_sharded(x)]
    if places:
        squares = sum_over_processes(torch.stack([found[place] for place in places]).square())
        for place, norm in zip(places, squares.sqrt(), strict=True):
            found[place] = norm
    return torch.stack(found)
