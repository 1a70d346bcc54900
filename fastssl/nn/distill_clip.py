"""The losses of CLIP's distillation as a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._arithmetic import as_scalar, dot, finish
from fastssl._checks import check_flag, check_pair, check_rows, check_same_device, check_scalar
from fastssl.distributed import check_alike, default_group, gather_rows
from fastssl.functional import similarity_logsumexp
from fastssl.nn.clip import ClipLoss, overrides
from fastssl.ops._precision import accumulate_dtype


class DistillClipLoss(ClipLoss):
    """CLIP's loss, and the cross-entropy from a teacher's softmaxes to the student's. It takes the place of open_clip's
    class of this name.

    No logits are stored: `torch.nn.functional.scaled_dot_product_attention` sums up the student's rows with the weights
    of the teacher's softmaxes. Memory is O(B D) where PyTorch has a fused attention for the device and dtype, and there
    are first derivatives only. In several processes, each holds the rows of all for this part.

    A subclass that overrides `get_logits`, `get_ground_truth` or `dist_loss` gets their losses; logits are stored then.

    Attributes, arguments and errors: as of `ClipLoss`, with the same gradients.
    """

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The mean cross-entropy of rows of logits, which `forward` does not store."""
        return -(teacher_logits.softmax(1) * student_logits.log_softmax(1)).sum(1).mean()

    def forward(  # type: ignore[override]  # as open_clip's
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses.

        Args:
            image_features, text_features, logit_scale: as of `ClipLoss`, the student's.
            dist_image_features, dist_text_features: (B, E) rows, the teacher's, of any floating-point dtype.
            dist_logit_scale: the teacher's.
            output_dict: return {"contrastive_loss": CLIP's, "distill_loss": the cross-entropy}.

        Returns:
            (CLIP's loss, the cross-entropy), 0-d both, in image_features' dtype, float32 under autocast.

        Raises:
            TypeError, ValueError: as `ClipLoss`, and if the teacher's features do not fit the student's.
        """
        output_dict = check_flag("output_dict", output_dict)
        teacher = dist_image_features, dist_text_features
        if overrides(self, DistillClipLoss, "get_logits", "get_ground_truth", "dist_loss"):
            student_logits = self.get_logits(image_features, text_features, logit_scale)
            teacher_logits = self.get_logits(*teacher, dist_logit_scale)
            contrastive = self._cross_entropy(*student_logits)
            distill: Tensor = sum(self.dist_loss(t, s) for t, s in zip(teacher_logits, student_logits, strict=True)) / 2
        else:
            contrastive = super().forward(image_features, text_features, logit_scale)
            distill = self._distill(image_features, text_features, *teacher, logit_scale, dist_logit_scale)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

    def _distill(
        self,
        image: Tensor,
        text: Tensor,
        dist_image: Tensor,
        dist_text: Tensor,
        scale: float | Tensor,
        dist_scale: float | Tensor,
    ) -> Tensor:
        student, teacher = check_pair(image, text, "image_features", "text_features"), (dist_image, dist_text)
        for name, x in (("dist_image_features", dist_image), ("dist_text_features", dist_text)):
            check_rows(name, x, "(B, E)")
            check_same_device("image_features", image, name, x)
        if dist_image.shape != dist_text.shape or len(dist_image) != len(image):
            raise ValueError(
                "dist_image_features and dist_text_features must have the same shape, and image_features' number of"
                f" rows, got {', '.join(str(tuple(x.shape)) for x in (dist_image, dist_text, image))}"
            )
        scales = check_scalar("logit_scale", scale, image), check_scalar("dist_logit_scale", dist_scale, image)
        if self.world_size == 1:
            return _distillation(*student, *teacher, *scales, gather=lambda x: x)
        group = default_group(self.rank, self.world_size)
        names = "image_features", "text_features", "dist_image_features", "dist_text_features"
        tensors = dict(zip(names, (*student, *teacher), strict=True))
        tensors |= {"logit_scale": as_scalar(scales[0], image), "dist_logit_scale": as_scalar(scales[1], image)}
        check_alike(group, tensors)
        if self.local_loss and not self.gather_with_grad:
            return _distillation(*student, *teacher, *scales, gather=lambda x: gather_rows(x.detach(), group))
        loss = partial(_distillation, gather=partial(gather_rows, group=group))
        return self._share(loss, (*student, *teacher), scales, group)


def _distillation(
    image: Tensor,
    text: Tensor,
    dist_image: Tensor,
    dist_text: Tensor,
    scale: float | Tensor,
    dist_scale: float | Tensor,
    gather: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean cross-entropy of this process's rows and all columns, of both directions."""
    images, texts, dist_images, dist_texts = (gather(x) for x in (image, text, dist_image, dist_text))
    losses = _soft_cross_entropy(image, texts, scale, dist_image, dist_texts, dist_scale)
    losses = losses + _soft_cross_entropy(text, images, scale, dist_text, dist_images, dist_scale)
    return finish(losses / 2, "mean", image)


def _soft_cross_entropy(
    x: Tensor, y: Tensor, scale: float | Tensor, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: float | Tensor
) -> Tensor:
    """(B,), of each row from P, the teacher's softmax, to that of S = scale x y^T.

        -sum_j P_ij log softmax(S_i)_j = logsumexp_j S_ij - sum_j P_ij S_ij,    sum_j P_ij S_ij = scale <x_i, (P y)_i>

    P y is attention of the teacher's rows to the values y. It wants as many features in all three: zeros make them up.
    """
    dtype = accumulate_dtype(torch.promote_types(y.dtype, teacher_y.dtype))
    teacher_x, teacher_y, values = (t.to(dtype) for t in (teacher_x, teacher_y, y))
    width = max(y.shape[1], teacher_y.shape[1])
    attention = (
        F.pad(t, (0, width - t.shape[1]))[None, None]
        for t in (teacher_x * as_scalar(teacher_scale, x), teacher_y, values)
    )
    mean = F.scaled_dot_product_attention(*attention, scale=1.0)[0, 0, :, : y.shape[1]]
    return similarity_logsumexp(x, y, scale=scale, offset=dot(x, mean) * as_scalar(scale, x))
