"""One function per loss or operation: the face of the package.

Every function checks its arguments before any kernel runs, follows `torch.set_float32_matmul_precision`
and autocast for the precision of its products, and sums in float32.
"""

from fastssl.functional.contrastive import (
    clip_loss,
    dcl,
    info_nce,
    nt_xent,
    similarity_logsumexp,
    sup_con,
)
from fastssl.functional.correlation import (
    barlow_twins,
    covariance_loss,
    cross_correlation,
    redundancy_loss,
    variance_loss,
    vicreg,
)
from fastssl.functional.correlation import (
    correlation_algorithm as correlation_algorithm,
)
from fastssl.functional.distillation import (
    dino_loss,
    ibot_loss,
    prototype_distillation_loss,
    sinkhorn_center,
    sinkhorn_knopp,
    update_center_,
)
from fastssl.functional.ema import adamw_ema_step_, ema_update_
from fastssl.functional.koleo import koleo_loss
from fastssl.functional.linear_categorical import linear_categorical
from fastssl.functional.linear_cross_entropy import linear_cross_entropy
from fastssl.functional.masking import (
    block_masking_ids,
    gather_tokens,
    random_masking,
    random_masking_ids,
    restore_tokens,
    scatter_tokens,
    span_masking_ids,
    tube_masking_ids,
)
from fastssl.functional.memory_bank import enqueue_
from fastssl.functional.patches import masked_feature_loss, masked_patch_loss, patch_embed
from fastssl.functional.sigmoid import siglip_loss
from fastssl.functional.tokens import mask_tokens, sample_negatives, span_corruption
from fastssl.functional.topk_similarity import topk_similarity
from fastssl.functional.uniformity import uniformity

__all__ = [
    "adamw_ema_step_",
    "barlow_twins",
    "block_masking_ids",
    "clip_loss",
    "covariance_loss",
    "cross_correlation",
    "dcl",
    "dino_loss",
    "ema_update_",
    "enqueue_",
    "gather_tokens",
    "ibot_loss",
    "info_nce",
    "koleo_loss",
    "linear_categorical",
    "linear_cross_entropy",
    "mask_tokens",
    "masked_feature_loss",
    "masked_patch_loss",
    "nt_xent",
    "patch_embed",
    "prototype_distillation_loss",
    "random_masking",
    "random_masking_ids",
    "redundancy_loss",
    "restore_tokens",
    "sample_negatives",
    "scatter_tokens",
    "siglip_loss",
    "similarity_logsumexp",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "span_corruption",
    "span_masking_ids",
    "sup_con",
    "topk_similarity",
    "tube_masking_ids",
    "uniformity",
    "update_center_",
    "variance_loss",
    "vicreg",
]
