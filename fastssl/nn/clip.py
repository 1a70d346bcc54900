"""The loss of CLIP as a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl._arithmetic import as_scalar, cross_entropy, dot, finish, logsumexp
from fastssl._checks import check_flag, check_pair, check_positive, check_scalar, check_size
from fastssl._exponential_sums import row_sums
from fastssl.distributed import (
    ProcessGroup,
    Ring,
    check_alike,
    default_group,
    gather_rows,
    mean_over_processes,
    with_mean_gradient,
    with_scaled_gradient,
)
from fastssl.functional import clip_loss
from fastssl.ops._precision import product_precision


class ClipLoss(nn.Module):
    """The softmax loss of CLIP (arXiv:2103.00020). It takes the place of open_clip's class of this name.

    In several processes, each with a part of the batch, the texts travel from process to process: none holds the whole
    batch, and each computes only its share of the loss. The flags choose:

    - local_loss False: every process returns the loss of the whole batch. True: it returns that of its own pairs.
    - gather_with_grad True: the gradients of the features are those of the sum of the processes' losses, so that the
      averaged gradients of parameters are exact. False: they are those of this process's loss; without local_loss they
      are too small by a factor of the number of processes, with local_loss the other processes' rows are constants.

    The gradient of logit_scale is open_clip's; where both flags are True, it is on every process their mean.

    Attributes: as the arguments.

    Args:
        local_loss: see above.
        gather_with_grad: see above.
        cache_labels: without effect: there are no labels to store.
        rank: of this process.
        world_size: the number of processes; 1 for this one alone.
        use_horovod: must be False.

    A subclass that overrides `get_logits` or `get_ground_truth` gets the cross-entropies of those logits and labels.
    They are stored then.

    Raises:
        TypeError: if a flag is none, or rank or world_size no integer.
        ValueError: if use_horovod is True, rank negative, or world_size not positive.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if check_flag("use_horovod", use_horovod):
            raise ValueError(f"use_horovod must be False, processes talk by torch.distributed, got {use_horovod}")
        self.local_loss = check_flag("local_loss", local_loss)
        self.gather_with_grad = check_flag("gather_with_grad", gather_with_grad)
        self.cache_labels = check_flag("cache_labels", cache_labels)
        self.rank = check_size("rank", rank)
        self.world_size = check_positive("world_size", world_size)
        self.use_horovod = False

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) int64, the column of each row's positive in `get_logits`."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of images with texts, and of texts with images, which `forward` does not store.

        Returns:
            (N, N) both, N being B, or the rows of all processes; with local_loss (B, N).
        """
        if self.world_size == 1:
            images, texts = image_features, text_features
        else:
            images, texts = self._gathered(image_features, text_features)
        if self.local_loss:
            per_image = logit_scale * image_features @ texts.T
            per_text = logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            per_text = per_image.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean loss.

        Args:
            image_features: (B, D) rows, normalised by the caller; float32, bfloat16, float16 or float64.
            text_features: (B, D), of image_features' dtype and device.
            logit_scale: multiplies the similarities: a number or a tensor of one element.
            logit_bias: added to all similarities, which does not change the loss: its gradient is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            0-d loss in image_features' dtype, float32 under autocast.

        Raises:
            TypeError, ValueError: as `fastssl.functional.clip_loss`, and if rank and world_size are not those of
                torch.distributed's default group, or output_dict is no flag.
        """
        output_dict = check_flag("output_dict", output_dict)
        if overrides(self, ClipLoss, "get_logits", "get_ground_truth"):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            loss = self._cross_entropy(*logits)
        else:
            group = None if self.world_size == 1 else default_group(self.rank, self.world_size)
            features = image_features, text_features
            if group is not None and self.local_loss and not self.gather_with_grad:
                loss = _against_constants(*features, logit_scale, group)
            else:
                loss = self._share(partial(clip_loss, group=group), features, (logit_scale,), group)
            if logit_bias is not None:
                nothing = 0 * check_scalar("logit_bias", logit_bias, image_features)
                loss = loss + (nothing.to(loss) if isinstance(nothing, Tensor) else nothing)
        return {"contrastive_loss": loss} if output_dict else loss

    def _cross_entropy(self, per_image: Tensor, per_text: Tensor) -> Tensor:
        labels = self.get_ground_truth(per_image.device, per_image.shape[0])
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2

    def _gathered(self, *features: Tensor) -> list[Tensor]:
        """The rows of all processes, with the gradients that the flags choose."""
        group, (batch, _) = default_group(self.rank, self.world_size), features[0].shape
        check_alike(group, dict(zip(("image_features", "text_features"), features, strict=True)))
        if self.gather_with_grad:
            return [gather_rows(x, group) for x in features]
        rows = [gather_rows(x.detach(), group) for x in features]
        if self.local_loss:
            return rows
        before, after = self.rank * batch, (self.rank + 1) * batch
        return [torch.cat([every[:before], x, every[after:]]) for every, x in zip(rows, features, strict=True)]

    def _share(
        self,
        loss: Callable[..., Tensor],
        features: tuple[Tensor, ...],
        scales: tuple[float | Tensor, ...],
        group: ProcessGroup | None,
    ) -> Tensor:
        """loss(*features, *scales), that of this process's pairs with all rows, or as the flags say of all pairs."""
        if group is None:
            return loss(*features, *scales)
        scales = tuple(with_mean_gradient(s, group) if isinstance(s, Tensor) else s for s in scales)
        if not self.gather_with_grad:
            features = tuple(with_scaled_gradient(x, 1 / self.world_size) for x in features)
        value = loss(*features, *scales)
        return value if self.local_loss else mean_over_processes(value, group)

    def extra_repr(self) -> str:
        return (
            f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, rank={self.rank},"
            f" world_size={self.world_size}"
        )


def overrides(module: nn.Module, original: type[nn.Module], *names: str) -> bool:
    """Whether a subclass of the original has methods of these names of its own, which are then to be called."""
    return any(getattr(type(module), name) is not getattr(original, name) for name in names)


def _against_constants(image: Tensor, text: Tensor, logit_scale: float | Tensor, group: ProcessGroup) -> Tensor:
    """CLIP's loss of this process's pairs, all rows on the other side being constants."""
    image, text = check_pair(image, text, "image_features", "text_features")
    logit_scale = check_scalar("logit_scale", logit_scale, image)
    scale, precision = as_scalar(logit_scale, image), product_precision(image)
    ring = Ring(group, image_features=image, text_features=text, logit_scale=scale)
    own = torch.arange(image.shape[0], device=image.device)
    loss = 0
    for rows, columns in ((image, text.detach()), (text, image.detach())):
        negatives = logsumexp(*row_sums(rows, columns, scale, own, precision, ring))
        loss = loss + cross_entropy(negatives, dot(rows, columns) * scale) / 2
    return finish(loss, "mean", image)
