"""The losses of CoCa as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl._checks import check_flag, check_integer, check_number, check_rows, check_same_device, check_tensor
from fastssl.nn.clip import ClipLoss


class CoCaLoss(ClipLoss):
    """The losses of CoCa (arXiv:2205.01917): CLIP's, and the captions' cross-entropy. It takes the place of open_clip's
    class of this name.

    Attributes: as the arguments.

    Args:
        caption_loss_weight: of the captions' cross-entropy.
        clip_loss_weight: of CLIP's loss, which is not computed where it is 0.
        pad_id: the token that does not count.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as of `ClipLoss`.

    Raises:
        TypeError, ValueError: as `ClipLoss`, or if a weight is no number or not finite, or pad_id no integer.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = check_number("clip_loss_weight", clip_loss_weight)
        self.caption_loss_weight = check_number("caption_loss_weight", caption_loss_weight)
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=check_integer("pad_id", pad_id))

    def forward(  # type: ignore[override]  # as open_clip's
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses, weighted.

        Args:
            image_features, text_features, logit_scale: as of `ClipLoss`.
            logits: (B, L, V) scores of the tokens of a vocabulary at every place of the captions.
            labels: (B, L) int64, the tokens.
            output_dict: return {"contrastive_loss": CLIP's, "caption_loss": the captions'}.

        Returns:
            (CLIP's loss, the captions' loss), 0-d both.

        Raises:
            TypeError, ValueError: as `ClipLoss`, and if logits or labels do not fit.
            IndexError: if a label is no token of the vocabulary.
        """
        output_dict = check_flag("output_dict", output_dict)
        check_rows("logits", logits, "(B, L, V)", 3)
        check_tensor("labels", labels)
        if labels.shape != logits.shape[:2] or labels.dtype != torch.int64:
            found = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"labels must be int64 of shape {tuple(logits.shape[:2])}, as logits are, got {found}")
        check_same_device("logits", logits, "labels", labels)
        check_tensor("image_features", image_features)
        check_same_device("image_features", image_features, "logits", logits)
        if self.clip_loss_weight:
            contrastive: Tensor = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        else:
            contrastive = torch.tensor(0, device=logits.device)
        try:
            caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        except IndexError as error:
            rule = f"labels must be from 0 to below {logits.shape[2]}, or pad_id, {self.caption_loss.ignore_index}"
            raise IndexError(f"{rule}: {error}") from None
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)
