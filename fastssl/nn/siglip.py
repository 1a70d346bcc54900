"""The loss of SigLIP as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl._checks import check_choice, check_flag, check_positive, check_size
from fastssl.distributed import ProcessGroup, check_alike, default_group, gather_rows
from fastssl.functional import siglip_loss
from fastssl.nn.clip import overrides

_IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """The sigmoid loss of SigLIP (arXiv:2303.15343). It takes the place of open_clip's class of this name.

    In several processes, each with a part of the batch, the texts travel from process to process. A process returns the
    loss of its images with all texts. The gradients of the features are those of the sum of the processes' losses, so
    that the averaged gradients of parameters are exact.

    Attributes: as the arguments.

    Args:
        cache_labels: without effect, there are no labels to store.
        rank: of this process.
        world_size: the number of processes; 1 for none but this one.
        dist_impl: "bidir", "shift", "reduce" or "gather", which all give the same numbers, and here are one and the
            same; None: "bidir".
        chunk_size: without effect, there are no logits to store, in chunks or otherwise.

    A subclass that overrides `get_logits` or `get_ground_truth` gets the loss of those logits and labels. They are
    stored then, B x B of each process's texts.

    Raises:
        TypeError: if cache_labels is no flag, or rank, world_size or chunk_size no integer.
        ValueError: if dist_impl is unknown, rank or chunk_size negative, or world_size not positive.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels = check_flag("cache_labels", cache_labels)
        self.rank = check_size("rank", rank)
        self.world_size = check_positive("world_size", world_size)
        check_choice("dist_impl", dist_impl, (None, *_IMPLEMENTATIONS))
        self.dist_impl = "bidir" if dist_impl is None else dist_impl
        self.chunk_size = check_size("chunk_size", chunk_size)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(num_logits, num_logits) labels: 1 on the diagonal unless negative_only, -1 elsewhere."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """(B, B) logits of images with texts, which `forward` does not store."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of all pairs, divided by B.

        Args:
            image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
            text_features: (B, D), of image_features' dtype and device.
            logit_scale: multiplies the similarities: a number or a tensor of one element.
            logit_bias: added to the similarities: a number or a tensor of one element; None: 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            0-d loss in image_features' dtype, float32 under autocast.

        Raises:
            TypeError, ValueError: as `fastssl.functional.siglip_loss`, and if rank and world_size are not those of
                torch.distributed's default group, or output_dict is no flag.
        """
        output_dict = check_flag("output_dict", output_dict)
        group = None if self.world_size == 1 else default_group(self.rank, self.world_size)
        if overrides(self, SigLipLoss, "get_logits", "get_ground_truth"):
            loss = self._of_logits(image_features, text_features, logit_scale, logit_bias, group)
        else:
            bias = 0.0 if logit_bias is None else logit_bias
            loss = siglip_loss(image_features, text_features, logit_scale, bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss

    def _of_logits(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        texts = [text]
        if group is not None:
            check_alike(group, {"image_features": image, "text_features": text})
            texts = gather_rows(text, group).chunk(self.world_size)
        loss = image.new_zeros(())
        for process, others in enumerate(texts):
            logits = self.get_logits(image, others, logit_scale, logit_bias)
            negative_only = group is not None and process != self.rank
            labels = self.get_ground_truth(image.device, image.dtype, image.shape[0], negative_only=negative_only)
            loss = loss - F.logsigmoid(labels * logits).sum() / image.shape[0]
        return loss

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r}"
