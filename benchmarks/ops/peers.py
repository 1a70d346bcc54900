"""Other packages' implementations, to compare with: imported when asked for, and never needed."""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.library import Library


@functools.cache
def _torchvision() -> Library | None:
    """Makes torchvision importable, for packages that import it for parts that are not used here.

    Its import fails if its binary operators were built for another PyTorch. The two operators that it looks up by name
    get a schema here, and no kernel. The schemas live as long as the Library that is returned.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def lightly() -> ModuleType:
    """lightly.loss.

    Raises:
        ImportError: if lightly is not installed.
    """
    _torchvision()
    return importlib.import_module("lightly.loss")


def timm() -> ModuleType:
    """timm.

    Raises:
        ImportError: if timm is not installed.
    """
    _torchvision()
    return importlib.import_module("timm")


def sentence_transformers() -> ModuleType:
    """sentence_transformers.

    Raises:
        ImportError: if sentence-transformers is not installed.
    """
    _torchvision()
    return importlib.import_module("sentence_transformers")


def transformers() -> ModuleType:
    """transformers.

    Raises:
        ImportError: if transformers is not installed.
    """
    _torchvision()
    return importlib.import_module("transformers")


def pytorch_lightning() -> ModuleType:
    """pytorch_lightning.

    Raises:
        ImportError: if it is not installed.
    """
    _torchvision()
    return importlib.import_module("pytorch_lightning")


def open_clip_transformer() -> ModuleType:
    """open_clip.transformer.

    Raises:
        ImportError: if open_clip is not installed.
    """
    _torchvision()
    return importlib.import_module("open_clip.transformer")


def lightly_nt_xent_loss() -> type[nn.Module]:
    """lightly's NTXentLoss.

    Raises:
        ImportError: if lightly is not installed.
    """
    return lightly().NTXentLoss


class LightlyQueue(nn.Module):
    """lightly's NTXentLoss on queries, keys and a queue, which the first call with one of its size puts into its bank.

    Like lightly's, every call copies the bank, and then writes the keys into it.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.criterion = temperature, None

    def forward(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        if self.criterion is None or self.criterion.memory_bank.bank.shape != queue.shape:
            self.criterion = lightly().NTXentLoss(self.temperature, tuple(queue.shape))
            self.criterion.memory_bank.bank = queue.clone()
        return self.criterion(queries, keys)


@functools.cache
def open_clip() -> ModuleType:
    """open_clip.loss, read from its file: the package would import models, and torchvision with them.

    Raises:
        ImportError: if open_clip is not installed.
    """
    if (package := find_spec("open_clip")) is None:
        raise ImportError("No module named 'open_clip'")
    spec = spec_from_file_location("open_clip_loss", Path(package.submodule_search_locations[0]) / "loss.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metric_learning_sup_con(temperature: float) -> nn.Module:
    """pytorch-metric-learning's SupConLoss, averaged over all rows as in the paper, not only over losses above 0.

    Raises:
        ImportError: if pytorch-metric-learning is not installed.
    """
    from pytorch_metric_learning import losses, reducers

    return losses.SupConLoss(temperature, reducer=reducers.MeanReducer())


class MetricLearningNTXent(nn.Module):
    """pytorch-metric-learning's NTXentLoss of two views. It stores a row of similarities for every pair of negatives.

    Raises:
        ImportError: if pytorch-metric-learning is not installed.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        from pytorch_metric_learning.losses import NTXentLoss

        self.criterion = NTXentLoss(temperature)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        return self.criterion(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))
