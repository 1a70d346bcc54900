"""Self-distillation: schemas, fake kernels, derivatives, and the portable code.

A teacher's distribution P over K prototypes teaches a student's Q, with their logits t and s, a center c, and a
temperature each (DINO, arXiv:2104.14294):

    P = softmax((t - c) / teacher_temperature),    Q = softmax(s / student_temperature)
    H(P, Q) = sum_k P_k (lse - s_k / student_temperature),    dH/ds = (Q - P) / student_temperature

Summed over several teachers of one student row, of distributions whose sum is P and whose number is m, this is
m lse - <P, s> / student_temperature: a student row is read once, whatever m is. With M its maximum,

    loss = m log sum_k exp((s_k - M) / student_temperature) + sum_k P_k (M - s_k) / student_temperature

is a sum of terms of one sign, which cancels nothing.
"""

from fastssl.ops.distillation.distillation_loss import distillation_loss
from fastssl.ops.distillation.prototype_distillation_loss import prototype_distillation_loss
from fastssl.ops.distillation.sinkhorn import assignment_sums, assignments, column_logsumexp, column_sums

__all__ = [
    "assignment_sums",
    "assignments",
    "column_logsumexp",
    "column_sums",
    "distillation_loss",
    "prototype_distillation_loss",
]
