"""NT-Xent as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl._arithmetic import dot, finish, unit
from fastssl._checks import check_gather_distributed, check_pair, check_scalar, check_temperature
from fastssl.distributed import check_alike, gather_rows, rank, world_size
from fastssl.functional import nt_xent, similarity_logsumexp
from fastssl.nn.memory_bank import MemoryBankModule, check_bank_size


class NTXentLoss(nn.Module):
    """NT-Xent (SimCLR, arXiv:2002.05709), or InfoNCE against a queue (MoCo, arXiv:1911.05722).

    It takes the place of lightly's class of this name, without a change elsewhere.

    Attributes:
        memory_bank: the queue, a `MemoryBankModule`. It is not saved in the state dict, and the rows of an update that
            pass its end are dropped; `fastssl.nn.MemoryBank` drops none.
        temperature, gather_distributed: as given.

    Args:
        temperature: divides the similarities.
        memory_bank_size: (rows, features) of a queue of past `out1` to serve as the negatives of `out0`, in place of
            the rest of the batch; 0 for no queue. After the loss, `out1` enters the queue if `out0` requires a
            gradient.
        gather_distributed: take the rows of all processes as negatives, with their gradients; with a queue, enter
            them into it. All processes must hold the same number of rows. The mean of the processes' losses, and so
            the gradients that DistributedDataParallel averages, are those of one process on the whole batch.

    Raises:
        TypeError: if temperature is neither number nor tensor, memory_bank_size is no integers, or gather_distributed
            no flag.
        ValueError: if temperature is a number below 1e-8 in magnitude, if memory_bank_size has a negative entry or is
            neither 0 nor a pair, or if gather_distributed is True and torch.distributed is not available.
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(check_bank_size("memory_bank_size", memory_bank_size), gather_distributed)
        self.temperature = temperature
        self.gather_distributed = check_gather_distributed(gather_distributed)
        number = check_scalar("temperature", temperature)
        if not isinstance(number, Tensor) and abs(number) < 1e-8:
            raise ValueError(f"temperature must be at least 1e-8 in magnitude, got {temperature}")

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss.

        Args:
            out0: (B, D) embeddings of the first views, of any length.
            out1: (B, D) embeddings of the second views.

        Returns:
            0-d loss, in the dtype that `fastssl.functional.nt_xent` returns.

        Raises:
            TypeError, ValueError: as `fastssl.functional.nt_xent`, and with `gather_distributed` on every process, if
                they differ in shapes, dtypes, devices or requires_grad. The queue is then unchanged.
        """
        out0, out1 = check_pair(out0, out1, "out0", "out1")
        across = self.gather_distributed and world_size() > 1
        if self.memory_bank.size[0] == 0 and not across:
            return nt_xent(out0, out1, temperature=self.temperature)
        scale = 1 / check_temperature(self.temperature, out0)
        if across:
            check_alike(None, {"out0": out0, "out1": out1})
        losses = self._against_memory_bank if self.memory_bank.size[0] > 0 else self._against_all_processes
        return finish(losses(out0, out1, scale), "mean", out0)

    def _against_memory_bank(self, out0: Tensor, out1: Tensor, scale: float | Tensor) -> Tensor:
        if self.memory_bank.size[1] != out0.shape[1]:
            features = f"memory_bank_size's {self.memory_bank.size[1]} features"
            raise ValueError(f"out0 and out1 must have {features}, got shape {tuple(out0.shape)}")
        z0, z1 = unit(out0), unit(out1)
        positive = dot(z0, z1) * scale
        # No copy of the bank: the gradient of z0 does not read it again.
        negatives = self.memory_bank.bank.to(out0)
        lse = similarity_logsumexp(z0.to(out0.dtype), negatives, scale=scale, offset=positive)
        if z0.requires_grad:
            self.memory_bank.update(z1)
        return -F.logsigmoid(-lse)

    def _against_all_processes(self, out0: Tensor, out1: Tensor, scale: float | Tensor) -> Tensor:
        z = unit(torch.cat([out0, out1]))
        rows = z.shape[0]
        positive = dot(z, z.roll(rows // 2, 0)) * scale
        own = torch.arange(rows, device=z.device) + rank() * rows
        z = z.to(out0.dtype)
        return similarity_logsumexp(z, gather_rows(z), scale=scale, exclude=own, offset=positive)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"
