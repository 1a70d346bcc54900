"""InfoNCE as a module."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl.distributed import ProcessGroup
from fastssl.functional import info_nce


class InfoNCELoss(nn.Module):
    """InfoNCE (CPC, arXiv:1807.03748): each query must find its positive key among negative keys.

    Args:
        temperature: divides the similarities: a number, or a 0-d tensor, which gets its exact gradient.
        negative_mode: "unpaired", where all queries share their negative_keys, or "paired", where each has its own.
        in_batch_negatives: whether other queries' positive keys are negatives; None: where there are no negative_keys.
        symmetric: whether the positive keys must find their queries, too.
        normalize: divide each row by its Euclidean norm.
        label_smoothing: the share of the target that is spread over all of a query's keys.
        reduction: "mean" over the queries, "sum", or "none".
        group: processes that hold a part of the batch each; None: this process alone.

    `fastssl.functional.info_nce` says more of each, and raises what does not fit when the loss is called.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        negative_mode: str = "unpaired",
        in_batch_negatives: bool | None = None,
        symmetric: bool = False,
        normalize: bool = True,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.negative_mode = negative_mode
        self.in_batch_negatives = in_batch_negatives
        self.symmetric = symmetric
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.group = group

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            query: (B, D) float32, bfloat16, float16 or float64.
            positive_key: (B, D), of query's dtype and device.
            negative_keys: (K, D), or with negative_mode "paired" (B, K, D); see `fastssl.nn.MemoryBank` for a queue.
            negative_ids: (B, K), the rows of negative_keys that each query has; None: all, or its own.

        Returns:
            0-d loss, or with reduction "none" (B,) losses.

        Raises:
            TypeError, ValueError, IndexError: as `fastssl.functional.info_nce`.
        """
        return info_nce(
            query,
            positive_key,
            negative_keys,
            negative_ids=negative_ids,
            temperature=self.temperature,
            negative_mode=self.negative_mode,
            in_batch_negatives=self.in_batch_negatives,
            symmetric=self.symmetric,
            normalize=self.normalize,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, negative_mode={self.negative_mode!r}, reduction={self.reduction!r}"
