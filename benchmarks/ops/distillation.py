"""Self-distillation, against the code of DINO and iBOT, and lightly's losses.

Logits are given, as the last layer delivers them: the loss reads them and writes the student's gradient. In the last
benchmark the features and prototypes are given that this layer multiplies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import peers
from benchmarks.ops.registry import Benchmark, Function, Inputs, LossAndGradients, Results, Size, in_place

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04  # DINO's, before its warm-up ends
MODES = ("float32", "bfloat16")
_BLOCK_ELEMENTS = 1 << 22


def _logits(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """About as wide as the cosines that DINO's head delivers."""
    return (0.25 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _center(columns: int) -> Tensor:
    return _logits(1, columns, dtype=torch.float32, seed=1) / 4


def _dino_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """The student's views, which require gradients, those of the teacher, the center."""
    student, teacher, batch, columns = size
    views = [_logits(batch, columns, dtype=dtype, seed=2 + i) for i in range(student + teacher)]
    return *(x.requires_grad_() for x in views[:student]), *views[student:], _center(columns)


def _views(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    *views, center = inputs
    student, teacher = ([x for x in views if x.requires_grad is needed] for needed in (True, False))
    return loss(student, teacher, center=center)


def _dino_eager(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    """As DINO's code has it."""
    student = [x / STUDENT_TEMPERATURE for x in student]
    teacher = [((x - center) / TEACHER_TEMPERATURE).softmax(-1).detach() for x in teacher]
    total, terms = 0, 0
    for t, q in enumerate(teacher):
        for s, x in enumerate(student):
            if s != t:
                total, terms = total + torch.sum(-q * x.log_softmax(-1), dim=-1).mean(), terms + 1
    return total / terms


def _dino_lightly() -> Callable[..., Tensor]:
    """Its step moves the center, too; its student is float32."""
    loss, start = None, None

    def run(*inputs: Tensor) -> Tensor:
        nonlocal loss, start
        if loss is None:
            loss = peers.lightly().DINOLoss(inputs[-1].shape[-1], TEACHER_TEMPERATURE, TEACHER_TEMPERATURE)
            start = inputs[-1][None].clone()
        loss.center.data = start
        return _views(lambda student, teacher, center: loss(teacher, [x.float() for x in student]), *inputs)

    peers.lightly()
    return run


def _exact(student: list[Tensor], teacher: list[Tensor], center: Tensor, unlike: bool) -> LossAndGradients:
    """The mean over pairs and rows in float64, some rows at a time, and its gradients."""
    batch, columns = student[0].shape
    pairs = [(s, t) for s in range(len(student)) for t in range(len(teacher)) if not unlike or s != t]
    loss, gradients = torch.zeros((), dtype=torch.float64), [torch.zeros_like(x) for x in student]
    for rows in torch.arange(batch).split(max(1, _BLOCK_ELEMENTS // columns)):
        teachers = [((x[rows].double() - center.double()) / TEACHER_TEMPERATURE).softmax(-1) for x in teacher]
        for s, x in enumerate(student):
            logs = (x[rows].detach().double() / STUDENT_TEMPERATURE).log_softmax(-1)
            taught_by = [teachers[t] for i, t in pairs if i == s]
            target = sum(taught_by)
            loss -= (target * logs).sum()
            gradient = (len(taught_by) * logs.exp() - target) / (STUDENT_TEMPERATURE * len(pairs) * batch)
            gradients[s][rows] = gradient.to(x.dtype)
    return loss / (len(pairs) * batch), tuple(gradients)


@torch.no_grad()
def _dino_oracle(*inputs: Tensor) -> LossAndGradients:
    return _views(lambda student, teacher, center: _exact(student, teacher, center, unlike=True), *inputs)


def _dino_needs(size: Size, itemsize: int) -> dict[str, float]:
    """The log-softmax of every pair, and its product with the teacher's distribution."""
    student, teacher, batch, columns = size
    return dict.fromkeys(("naive", "compile", "lightly"), 4.0 * student * teacher * batch * columns * itemsize)


Benchmark(
    "dino_loss",
    sizes=(
        (10, 2, 64, 65536),
        (10, 2, 8, 65536),
        (2, 2, 256, 4096),
    ),  # views of student and teacher, images, prototypes
    memory_sizes=(),
    inputs=_dino_inputs,
    # The student's logits are read, their gradient is written, the teacher's logits are read.
    traffic=lambda size, itemsize: (2 * size[0] + size[1]) * size[2] * size[3] * itemsize,
    needs=_dino_needs,
    call=_views,
    naive=_dino_eager,
    peers={"lightly": _dino_lightly},
    timed="forward + backward, from logits",
    oracle=_dino_oracle,
    modes=MODES,
)


def _ibot_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    student, teacher = (_logits(*size, dtype=dtype, seed=seed) for seed in (2, 3))
    return student.requires_grad_(), teacher, _center(size[1])


def _rows(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    return loss(student, teacher, center=center)


def _ibot_eager(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """As the code of iBOT and DINOv2 has it, with equal weights."""
    target = ((teacher - center) / TEACHER_TEMPERATURE).softmax(-1).detach()
    return -(target * (student / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()


def _ibot_lightly() -> Callable[..., Tensor]:
    """Its step moves the center, too. All rows are those of one image: the weights are 1 / N."""
    loss = None

    def run(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        nonlocal loss
        if loss is None:
            loss = peers.lightly().IBOTPatchLoss(center.shape[-1], TEACHER_TEMPERATURE, STUDENT_TEMPERATURE)
        loss.center.center = center
        return loss(teacher, student, torch.ones(1, len(student), 1, dtype=torch.bool, device=student.device))

    peers.lightly()
    return run


@torch.no_grad()
def _ibot_oracle(student: Tensor, teacher: Tensor, center: Tensor) -> LossAndGradients:
    return _exact([student], [teacher], center, unlike=False)


Benchmark(
    "ibot_loss",
    sizes=((4096, 65536), (1024, 65536), (4096, 4096)),  # masked patches x prototypes
    memory_sizes=(),
    inputs=_ibot_inputs,
    traffic=lambda size, itemsize: 3 * size[0] * size[1] * itemsize,
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile", "lightly"), 5.0 * size[0] * size[1] * itemsize),
    call=_rows,
    naive=_ibot_eager,
    peers={"lightly": _ibot_lightly},
    timed="forward + backward, from logits",
    oracle=_ibot_oracle,
    modes=MODES,
)


def _prototype_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Features and prototypes of unit length, as of DINO's head, whose teacher is near its student; and the center."""
    rows, dim, columns = size
    student, prototypes = (
        F.normalize(_logits(count, dim, dtype=torch.float32, seed=seed), dim=-1)
        for count, seed in ((rows, 2), (columns, 3))
    )
    teacher, teacher_prototypes = (
        F.normalize(x + _logits(*x.shape, dtype=torch.float32, seed=4) / dim**0.5, dim=-1)
        for x in (student, prototypes)
    )
    leaves = (x.to(dtype).requires_grad_() for x in (student, prototypes))
    return *leaves, teacher.to(dtype), teacher_prototypes.to(dtype), _center(columns)


def _prototypes(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    *features, center = inputs
    return loss(*features, center=center)


def _prototype_eager(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> Tensor:
    """Linear layers, and the loss as the code of iBOT and DINOv2 has it."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher, teacher_prototypes)
    return _ibot_eager(F.linear(student, prototypes), teacher_logits, center)


@torch.no_grad()
def _prototype_oracle(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> LossAndGradients:
    """In float64, some rows at a time."""
    x, w, y, v, c = (z.double() for z in (student, prototypes, teacher, teacher_prototypes, center))
    loss, grad_x, grad_w = torch.zeros((), dtype=torch.float64), torch.empty_like(x), torch.zeros_like(w)
    for rows in torch.arange(len(x)).split(max(1, _BLOCK_ELEMENTS // len(w))):
        target = ((y[rows] @ v.T - c) / TEACHER_TEMPERATURE).softmax(-1)
        logs = (x[rows] @ w.T / STUDENT_TEMPERATURE).log_softmax(-1)
        loss -= (target * logs).sum()
        weights = (logs.exp() - target) / (STUDENT_TEMPERATURE * len(x))
        grad_x[rows] = weights @ w
        grad_w += weights.T @ x[rows]
    return loss / len(x), (grad_x.to(student.dtype), grad_w.to(prototypes.dtype))


Benchmark(
    "prototype_distillation_loss",
    sizes=((4096, 256, 65536), (512, 256, 65536), (512, 256, 8192)),  # masked patches x features, prototypes
    memory_sizes=(),
    inputs=_prototype_inputs,
    # Features, prototypes and the gradients of the student's.
    traffic=lambda size, itemsize: 3 * (size[0] + size[2]) * size[1] * itemsize,
    # Logits of student and teacher, and a product with the weights for either side.
    flops=lambda size: 4 * 2.0 * size[0] * size[1] * size[2],
    needs=lambda size, itemsize: dict.fromkeys(("naive", "compile"), 7.0 * size[0] * size[2] * itemsize),
    call=_prototypes,
    naive=_prototype_eager,
    timed="forward + backward, from features",
    oracle=_prototype_oracle,
)


ITERATIONS = 3  # DINOv2's
_SHOWN = 64  # rows whose assignments are compared


def _teacher(size: Size, dtype: torch.dtype) -> Inputs:
    return (_logits(*size, dtype=dtype, seed=3),)


def _output(function: Function, inputs: Inputs) -> Results:
    return (function(*inputs),), ()


@torch.no_grad()
def _by_scaling(logits: Tensor) -> Tensor:
    """As DINOv2's code has it: exponentials, prototype by prototype and sample by sample."""
    share = torch.exp(logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEACHER_TEMPERATURE).t()
    prototypes, rows = share.shape
    share /= share.sum()
    for _ in range(ITERATIONS):
        share /= share.sum(1, keepdim=True)
        share /= prototypes
        share /= share.sum(0, keepdim=True)
        share /= rows
    share *= rows
    return share.t()


def _sinkhorn_lightly() -> Callable[..., Tensor]:
    peers.lightly()
    from lightly.loss.swav_loss import sinkhorn

    return lambda logits: sinkhorn(logits, ITERATIONS, TEACHER_TEMPERATURE)


def _some_assignments(inputs: Inputs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a center, or of all assignments."""
    (result,), logits = results, inputs[0][:_SHOWN]
    return (result[:_SHOWN] if result.dim() == 2 else ((logits - result) / TEACHER_TEMPERATURE).softmax(1),)


for _name, _written in (("sinkhorn_center", 0), ("sinkhorn_knopp", 1)):
    Benchmark(
        _name,
        sizes=((4096, 65536), (1024, 65536), (4096, 4096)),  # rows x prototypes
        memory_sizes=(),
        inputs=_teacher,
        # Each iteration reads the logits. To assign them reads them again, and writes float32.
        traffic=lambda size, itemsize, written=_written: (
            size[0] * size[1] * ((ITERATIONS + written) * itemsize + 4 * written)
        ),
        needs=lambda size, itemsize: dict.fromkeys(("naive", "compile", "lightly"), 8.0 * size[0] * size[1]),
        naive=_by_scaling,
        peers={"lightly": _sinkhorn_lightly},
        step=_output,
        timed="from logits",
        settle=_some_assignments,
        modes=MODES,
    )


@torch.no_grad()
def _move(center: Tensor, logits: Tensor) -> None:
    """As DINO's code has it, in place."""
    center.copy_(center * 0.9 + logits.sum(0) / len(logits) * (1 - 0.9))


Benchmark(
    "update_center_",
    sizes=((4096, 65536), (128, 65536), (1024, 65536)),  # rows x prototypes
    memory_sizes=(),
    inputs=lambda size, dtype: (_center(size[1])[0], *_teacher(size, dtype)),
    traffic=lambda size, itemsize: size[0] * size[1] * itemsize,
    needs=lambda size, itemsize: {"naive": 8.0 * size[1]},
    naive=_move,
    step=in_place,
    timed="one update",
    modes=MODES,
)
