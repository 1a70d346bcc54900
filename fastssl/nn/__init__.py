"""Drop-in modules, thin over `fastssl.functional`."""

from fastssl.nn.memory_bank import MemoryBank
from fastssl.nn.ntxent import NTXentLoss

__all__ = ["MemoryBank", "NTXentLoss"]
