"""Other packages' implementations, to compare with: imported when asked for, and never needed."""

from __future__ import annotations

from torch import nn
from torch.library import Library


def lightly_nt_xent_loss() -> type[nn.Module]:
    """lightly's NTXentLoss.

    Raises:
        ImportError: if lightly is not installed.
    """
    try:
        from lightly.loss import NTXentLoss
    except RuntimeError as error:
        # lightly imports torchvision for other losses, and torchvision refuses to be imported where its binary
        # operators were built for another PyTorch: the two that it asks for by name get a schema, and no kernel.
        if "torchvision::" not in str(error):
            raise
        torchvision = Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from lightly.loss import NTXentLoss

        NTXentLoss._torchvision = torchvision  # the schemas live as long as the Library that defined them
    return NTXentLoss
