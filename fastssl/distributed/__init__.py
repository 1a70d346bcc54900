"""What a loss needs from the other processes: their number, their rows, or sums over all rows."""

from fastssl.distributed import contrastive, distillation, koleo, linear_cross_entropy, sigmoid
from fastssl.distributed.processes import (
    ProcessGroup,
    all_processes,
    check_alike,
    check_group,
    default_group,
    gather_rows,
    mean_over_processes,
    rank,
    sum_over_processes,
    with_mean_gradient,
    with_scaled_gradient,
    world_size,
)
from fastssl.distributed.ring import Ring

__all__ = [
    "ProcessGroup",
    "Ring",
    "all_processes",
    "check_alike",
    "check_group",
    "contrastive",
    "default_group",
    "distillation",
    "gather_rows",
    "koleo",
    "linear_cross_entropy",
    "mean_over_processes",
    "rank",
    "sigmoid",
    "sum_over_processes",
    "with_mean_gradient",
    "with_scaled_gradient",
    "world_size",
]
