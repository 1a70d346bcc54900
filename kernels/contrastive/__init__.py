"""Softmax contrastive losses on the GPU: log-sum-exps of similarities, and the products of their gradients."""

from fastssl.kernels.contrastive.clip_loss import clip_loss, clip_loss_backward
from fastssl.kernels.contrastive.dcl import dcl, dcl_backward
from fastssl.kernels.contrastive.info_nce import info_nce, info_nce_backward
from fastssl.kernels.contrastive.logsumexp import (
    pair_logsumexp,
    pair_logsumexp_backward,
    self_logsumexp,
    self_logsumexp_backward,
    similarity_logsumexp,
    similarity_logsumexp_backward,
)
from fastssl.kernels.contrastive.nt_xent import nt_xent, nt_xent_backward
from fastssl.kernels.contrastive.selected_logsumexp import selected_logsumexp, selected_logsumexp_backward
from fastssl.kernels.contrastive.sup_con import sup_con, sup_con_backward

__all__ = [
    "clip_loss",
    "clip_loss_backward",
    "dcl",
    "dcl_backward",
    "info_nce",
    "info_nce_backward",
    "nt_xent",
    "nt_xent_backward",
    "pair_logsumexp",
    "pair_logsumexp_backward",
    "selected_logsumexp",
    "selected_logsumexp_backward",
    "self_logsumexp",
    "self_logsumexp_backward",
    "similarity_logsumexp",
    "similarity_logsumexp_backward",
    "sup_con",
    "sup_con_backward",
]
