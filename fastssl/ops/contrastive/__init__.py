"""Softmax contrastive losses: schemas, fake kernels, derivatives, and the portable code.

NT-Xent, with z the 2B (normalised) rows of [z1; z2], S = scale z z^T, pos(i) = (i + B) mod 2B:

    lse_i  = log sum_{j != i} exp(S_ij) = shift_i + log(total_i)
    loss_i = lse_i - S_{i, pos(i)}

The forward pass keeps the log-sum-exp as the pair (shift, total), the shift being the row's maximum or any
number near enough to it: the backward pass then divides by the very sum that the forward pass took, and a
log-sum-exp of 100, rounded to float32, costs no accuracy. Its gradient, given g_i = dL/dloss_i, with a symmetric
matrix W that is never stored:

    a_i      = g_i / total_i
    W_ij     = a_i exp(S_ij - shift_i) + a_j exp(S_ij - shift_j) - [j = pos(i)] (g_i + g_j),    W_ii = 0
    dL/dz_i  = scale G_i,  G = W z
    dL/dscale = 1/2 sum_i <z_i, G_i>

and, where rows were normalised, z = x / |x|:   dL/dx_i = (dL/dz_i - <dL/dz_i, z_i> z_i) / |x_i|.

The other operations are log-sum-exps of the similarities of two sets of rows, S = scale x y^T, from which
`fastssl.functional` makes every other softmax contrastive loss: the positives are cheap, O(B D), and are left to
autograd. In row i the column exclude[i] is left out, most often the positive: with n_i the log-sum-exp of the
negatives, InfoNCE is softplus(n_i - S_ip), which loses nothing where a confident model makes it small.

    similarity_logsumexp   of each row of S
    pair_logsumexp         of each row and of each column of S (CLIP)
    self_logsumexp         of each row of S = scale z z^T without the diagonal (SupCon, uniformity)
    selected_logsumexp     of each row's similarities with rows of its own choice, by their ids (InfoNCE)

and clip_loss, info_nce, sup_con and dcl, which do that in one operation, the norms of rows included: in a small batch
the elementwise steps cost most. info_nce is the loss of one direction, clip_loss that of both. SupCon's positives are
the other rows of row i's label, c_i of them, and need no product either:

    loss_i = lse_i - <z_i, sum_j z_j - z_i> scale / c_i,  j of row i's label,    0 where there are none

Label smoothing with a share e (clip_loss, info_nce) adds e scale <x_i, y_i - mean_j y_j> to loss_i, O(N D) again; its
gradient, given g_i, for info_nce and, halved and with both terms, for either side of clip_loss:

    dL/dx_i = e scale g_i (y_i - mean_j y_j),    dL/dy_i = e scale (g_i x_i - mean_j g_j x_j)

DCL is NT-Xent whose sum leaves out the positive, with n_i its log-sum-exp and weights w_i:

    loss_i = n_i - w_i S_{i, pos(i)}

Each gives the log-sum-exp as a pair again, total_i = sum_j E_ij, E_ij = exp(S_ij - shift_i); here shift_i is the row's
largest S_ij, which metrics read, or 0 where every column is excluded (not in self_logsumexp: any number near). What is
differentiated is total, with the shift held constant: shift + log(total) then has every derivative of the log-sum-exp.
Given the gradients g_i of the rows' totals, h_j of the columns', and W their weights, W_ij = g_i E_ij +
h_j exp(S_ij - shift'_j),

    dL/dx = scale W y,    dL/dy = scale W^T x,    dL/dscale = <x, W y>,    dL/dz = scale (W + W^T) z

Where only rows are summed, W y = g (E y): as flash attention does, the forward pass takes the weighted sum E y beside
the total (`weigh`), so the backward pass recomputes S for y alone, and reads nothing of a y without gradient: a
queue may move on between the two. So does info_nce, whose forward pass ends with the derivatives of each row's loss by
the row (but for the factor scale) and by scale: for keys without gradients the backward pass is their product with g.

The exponentials E are what the forward and the backward pass both need. Where the caller allows it (`keep`, in bytes:
`bytes_to_keep`), a kernel keeps those of as many tiles as fit, in `kept`, a tensor of just that many bytes whose
contents are the kernel's own; the backward pass then need not multiply for them again. On a GPU it is the products that
are kept, all or none, and only where reading them is quicker than multiplying again (kernels/common/kept.py).
"""

from fastssl.ops.contrastive._shared import bytes_to_keep, nothing_kept
from fastssl.ops.contrastive.clip_loss import clip_loss
from fastssl.ops.contrastive.dcl import dcl
from fastssl.ops.contrastive.info_nce import info_nce
from fastssl.ops.contrastive.nt_xent import nt_xent
from fastssl.ops.contrastive.pair_logsumexp import pair_logsumexp
from fastssl.ops.contrastive.selected_logsumexp import selected_logsumexp
from fastssl.ops.contrastive.self_logsumexp import self_logsumexp
from fastssl.ops.contrastive.similarity_logsumexp import similarity_logsumexp
from fastssl.ops.contrastive.sup_con import class_sums, sup_con

__all__ = [
    "bytes_to_keep",
    "class_sums",
    "clip_loss",
    "dcl",
    "info_nce",
    "nothing_kept",
    "nt_xent",
    "pair_logsumexp",
    "selected_logsumexp",
    "self_logsumexp",
    "similarity_logsumexp",
    "sup_con",
]
