"""Counts what the operations do on a GPU: launches, products, exponentials and bytes; and what an H100 makes of them.

    python docs/gpu.py

prints the tables of gpu.md. The launchers of the Triton kernels run at full size, on tensors without memory ("meta"):
each launch, and each operation of PyTorch, is counted instead of executed. It reads and writes each of its tensors
once; `KERNELS` says where that is not so, and what it computes. The CUDA C++ kernels, which need memory, are listed by
hand in `MOVES`; tests/gpu/cuda_host/ counts their launches. Times are arithmetic: nothing was measured.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from fastssl import functional
from fastssl.kernels import contrastive, correlation, distillation, koleo, row_sums, sigmoid
from fastssl.kernels import linear_categorical as categorical
from fastssl.kernels import linear_cross_entropy as linear
from fastssl.ops.koleo import _add_on_gpu_, _backward, _forward

# An H100 (SXM), per second: FLOP of bfloat16 products, and of float32 without tensor cores; bytes of memory, and of the
# second-level cache; exponentials, reciprocals and conversions; integer operations. Bytes of that cache.
TENSOR, FLOAT32, MEMORY, CACHE, SPECIAL, INTEGER = 800e12, 60e12, 3.0e12, 5.5e12, 3.6e12, 15e12
CACHE_BYTES = 50 << 20
PROGRAMS = 4 * 132  # of 256 threads, that run at a time
# What an estimate takes: tiles of 128 x 128, of 128 x 256, with sums in registers, cuBLAS; the share of other rates;
# seconds from one launch to the next.
TILE, WIDE_TILE, REGISTERS, CUBLAS, SHARE, GAP = 350e12, 500e12, 480e12, 650e12, 0.6, 2e-6


class Work(NamedTuple):
    """Of a launch. rate, peak: the FLOP per second of an estimate, and at most."""

    flops: float = 0
    special: float = 0
    bytes: float = 0
    cached: float = 0  # bytes from the second-level cache
    integers: float = 0
    rate: float = TILE
    peak: float = TENSOR

    @property
    def seconds(self) -> float:
        """An estimate. Kernels over tiles do not hide their bytes behind products, others do."""
        busy = max(self.flops / self.rate, self.special / (SHARE * SPECIAL), self.integers / (SHARE * INTEGER))
        moved = self.bytes / MEMORY + self.cached / CACHE
        return GAP + (busy + moved if self.rate in (TILE, WIDE_TILE, REGISTERS) and self.flops else max(busy, moved))


class Cost(NamedTuple):
    launches: int
    flops: float
    bytes: float
    floor: float
    estimate: float


def cost_of(work: list[Work]) -> Cost:
    def total(of: Callable[[Work], float]) -> float:
        return sum(map(of, work))

    floor = max(
        total(lambda w: w.flops / w.peak),
        total(lambda w: w.bytes) / MEMORY,
        total(lambda w: w.special) / SPECIAL,
        total(lambda w: w.integers) / INTEGER,
    )
    return Cost(len(work), total(lambda w: w.flops), total(lambda w: w.bytes), floor, total(lambda w: w.seconds))


# What kernels compute, and which bytes they move where it is not every argument once. Of the arguments by their names.
Arguments = dict[str, Any]


def _bytes(a: Arguments, *without: str) -> int:
    """Of arguments. The same tensor twice is read once, unless it is written as the `gradient`."""
    tensors = {name: x for name, x in a.items() if isinstance(x, Tensor) and name not in without}
    places = {(x.untyped_storage()._cdata, x.storage_offset(), n == "gradient"): x for n, x in tensors.items()}
    return sum(x.numel() * x.element_size() for x in places.values())


def _accumulate(a: Arguments) -> Work:
    derive, pairs = a["gradient"] is not None, a["M"] * a["N"]
    special = {"softmax": 1, "both": 1, "column": 1, "sigmoid": 3}[a["WEIGHT"]] if derive else 0
    if a["losses"] is not None:
        special += 1 if derive else 2
    return Work((4 if derive else 2) * pairs * a["D"], special * pairs, _bytes(a), rate=REGISTERS)


def _forward_tile(a: Arguments) -> Work:
    entries = math.ceil(a["M"] / a["T"]) * a["band"] * a["T"] ** 2
    return Work(2 * entries * a["D"], (1 if a["column_tops"] is None else 2) * entries, _bytes(a))


def _weigh_block(a: Arguments) -> Work:
    height, width, D = a["height"], a["width"], a["D"]
    special = {"softmax": 1, "both": 2, "column": 1, "sigmoid": 2}[a["WEIGHT"]] if a["w"] is not None else 0
    special += 2 if a["losses"] is not None else 0
    read = (height + width) * D * a["left"].element_size()
    moved = read + _bytes(a, "left", "right")
    return Work(2 * height * width * D, special * height * width, moved, rate=WIDE_TILE)


def _gram(a: Arguments) -> Work:
    products = _bytes({name: a[name] for name in ("products_a", "products_b")})
    return Work(bytes=_bytes(a) - products / 2)  # the lower half


def _nearest_tile(a: Arguments) -> Work:
    rate = SHARE * FLOAT32
    return Work(a["N"] * (a["N"] + a["T"]) * a["D"], 0, _bytes(a), rate=rate, peak=FLOAT32)


def _of_rows(special: int, a: Arguments, *logits: str, walks: int = 2) -> Work:
    """Of kernels that take a row of logits in each program, and walk along it, which begin at about the same time."""
    first = a[logits[0]]
    rows, moved = first.shape[:-1].numel(), sum(_bytes({name: a[name]}) for name in logits)
    again = {}
    if walks == 2:
        again = {"cached" if min(PROGRAMS / rows, 1) * moved <= CACHE_BYTES else "bytes": moved}
    return Work(special=walks * special * first.numel(), **(again | {"bytes": _bytes(a) + again.get("bytes", 0)}))


def _distill(a: Arguments) -> Work:
    (views, rows, K), teachers, first = a["student"].shape, a["T"], a["first_view"]
    pairs = views * teachers - sum(first <= t < first + views for t in range(teachers)) if a["UNLIKE"] else views
    walks = 1 + (a["gradient"] is not None)
    return _of_rows(0, a, "student", "teacher", walks=walks)._replace(special=walks * (views + pairs) * rows * K)


def _chosen(a: Arguments, rows: str, count: int) -> Work:
    z, D = a[rows], a["D"]
    gathered = count * D * z.element_size()
    moved = {"bytes": _bytes(a, rows)}
    if z.numel() * z.element_size() <= CACHE_BYTES:
        moved["cached"] = gathered
    else:
        moved["bytes"] += gathered
    return Work(2 * count * D, rate=SHARE * FLOAT32, peak=FLOAT32, **moved)


KERNELS: dict[str, Callable[[Arguments], Work]] = {
    "_differentiate": lambda a: Work(bytes=_bytes(a, "gram")),  # of which the diagonal
    "_forward_tile": _forward_tile,
    "_gradient_sums": lambda a: Work(bytes=_bytes(a, "gram", "other" if a["rstd"] is None else "gram")),
    "_gram": _gram,
    "_join": lambda a: Work(),  # of ids with more than 32 rows, one in 32
    "accumulate_narrow": _accumulate,
    "cross_entropy": lambda a: _of_rows(1, a, "logits", walks=1 + (a["gradient"] is not None)),
    "distill": _distill,
    "draw": lambda a: Work(special=4 * a["logits"].numel(), integers=40 * a["logits"].numel(), bytes=_bytes(a)),
    "nearest_tile": _nearest_tile,
    "normalise": lambda a: _of_rows(1, a, "logits", walks=1 + (a["output"] is not None)),
    "selected_dots": lambda a: _chosen(a, "y", a["ids"].numel()),
    "sum_columns": lambda a: Work(special=(a["tops"] is not None) * a["logits"].numel(), bytes=_bytes(a)),
    "sum_exponentials": lambda a: Work(special=a["logits"].numel(), bytes=_bytes(a)),
    "weigh": _weigh_block,
    "weighted_sums": lambda a: _chosen(a, "z", a["weights"].numel()),
}


class _Operations(TorchDispatchMode):
    """Those of PyTorch that compute on a GPU, instead of executing them; and the project's own, by their launchers."""

    def __init__(self, work: list[Work]) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        launcher = LAUNCHERS.get(func._schema.name)
        if launcher is not None:
            with self:
                return launcher(*args, **kwargs)
        out = kwargs.get("out")
        results = func(*args, **kwargs) if out is None else out
        tensors = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.is_meta and x.numel()]
        if "_assert_async" in func.name() or tensors and not func.is_view and "empty" not in func.name():
            self.work.append(self._of(func._schema.name, tensors, args, kwargs))
        return results

    def _of(self, name: str, results: list[Tensor], args: Any, kwargs: Any) -> Work:
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        read = () if re.search(r"::(new|fill_|zero_)|_like$", name) else inputs[name == "aten::copy_" :]
        moved = sum(x.numel() * x.element_size() for x in (*read, *results))
        work = Work()
        if name in ("aten::addmm", "aten::mm"):
            left, right = inputs[-2:]
            peak = FLOAT32 if left.dtype == torch.float32 else TENSOR
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            work = Work(flops, rate=CUBLAS * peak / TENSOR, peak=peak)
            if kwargs.get("beta") == 0:
                moved -= inputs[0].numel() * inputs[0].element_size()
        return work._replace(bytes=moved)


LAUNCHERS = {
    "fastssl::assignment_sums": distillation.assignment_sums,
    "fastssl::column_logsumexp": distillation.column_logsumexp,
    "fastssl::self_logsumexp": contrastive.self_logsumexp,
    "fastssl::self_logsumexp_backward": contrastive.self_logsumexp_backward,
    "fastssl::sum_rows": row_sums.sum_rows,
}


@contextmanager
def counted() -> Iterator[list[Work]]:
    """The launches of what runs meanwhile, on meta tensors."""
    work: list[Work] = []
    launch = KernelInterface.__getitem__

    def count(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
            a = dict(zip(function.arg_names, args, strict=False)) | kwargs
            rule = KERNELS.get(function.__name__, lambda a: Work(bytes=_bytes(a)))
            work.append(rule(a))

        return run

    KernelInterface.__getitem__ = count
    try:
        with _Operations(work):
            yield work
    finally:
        KernelInterface.__getitem__ = launch


def _new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_float32, _int64 = partial(_new, dtype=torch.float32), partial(_new, dtype=torch.int64)
NUMBERS = {
    "bias": None, "center": None, "class_weight": None, "exclude": None, "derive": True, "derive_input": True,
    "derive_weight": True, "eps": 1e-5, "ignore_index": -100, "invariance_param": 1.0, "keep": 0,
    "label_smoothing": 0.0, "lambda_param": 1.0, "mu_param": 1.0, "normalize": True, "nu_param": 1.0,
    "precision": "bfloat16", "reduction": "none", "student_temperature": 0.1, "teacher_temperature": 0.04,
    "unbiased": True, "weigh": True,
}  # fmt: skip


def passes(launchers: Any, name: str, **inputs: Any) -> list[list[Work]]:
    """Of an operation: forward, and backward where it has such a launcher. As in fastssl/ops/, arguments go by their
    names: a backward pass takes inputs and outputs of the forward pass, and the gradients of outputs."""
    given, counts = NUMBERS | inputs, []
    for launcher in (getattr(launchers, x) for x in (name, f"{name}_backward") if hasattr(launchers, x)):
        with counted() as work:
            outputs = launcher(**{x: given.get(x, True) for x in inspect.signature(launcher).parameters})
        counts.append(work)
        returned = getattr(torch.ops.fastssl, name).default._schema.returns
        if len(counts) == 1 and isinstance(outputs, tuple):
            named = {x.name: value for x, value in zip(returned, outputs, strict=True)}
            given = given | named | {f"grad_{x}": value for x, value in named.items()}
    return counts


def called(run: Callable[[], Any]) -> list[Work]:
    """Of a public function."""
    with counted() as work:
        run()
    return work


N = 32768  # rows of each side, or of both views together
BATCH = 256  # where launches matter


def losses_of_pairs(N: int, D: int) -> dict[str, list[list[Work]]]:
    x, y, scale = _new(N, D), _new(N, D), _float32()
    views = {"z1": x[: N // 2], "z2": y[: N // 2], "scale": scale}
    of = partial(passes, contrastive)
    softplus = partial(passes, sigmoid, "similarity_softplus", x=x, y=y, scale=scale)
    return {
        "`clip_loss`": of("clip_loss", x=x, y=y, scale=scale),
        "`info_nce`": of("info_nce", query=x, positive_key=y, scale=scale),
        "`nt_xent`": of("nt_xent", **views),
        "`dcl`": of("dcl", weight=_float32(N), **views),
        "`sup_con`": of("sup_con", z=x, labels=_int64(N), scale=scale),
        "`similarity_softplus`": [softplus(bias=scale, derive=False)[0], softplus(bias=scale)[0]],
        "`similarity_logsumexp`": of("similarity_logsumexp", x=x, y=y, scale=scale),
        "`pair_logsumexp`": of("pair_logsumexp", x=x, y=y, scale=scale),
        "`self_logsumexp`": of("self_logsumexp", z=x, scale=scale),
    }


def _other_operations() -> Iterator[tuple[str, str, list[Work]]]:
    for N, D in ((256, 8192), (4096, 8192), (8192, 8192)):
        views = {"z_a": _new(N, D), "z_b": _new(N, D), "dual": 4 * N <= 3 * D}
        for name in ("barlow_twins", "vicreg"):
            forward, backward = passes(correlation, name, **views)
            yield f"`{name}`", f"{N:,} x {D:,}", forward
            yield "", "its backward pass", backward
    N, D = 32768, 128
    yield "`uniformity`, forward", f"{N:,} x {D}", called(lambda: functional.uniformity(_new(N, D)))
    N, D = 4096, 1024
    forward = called(lambda: _forward(koleo.nearest_rows, _new(N, D), 0, N, 1, N, 1e-8))
    yield "`koleo_loss`", f"{N:,} x {D:,}", forward
    backward = called(lambda: _backward(_add_on_gpu_, _float32(), _new(N, D), _int64(N, 1), 0, 1e-8))
    yield "", "its backward pass", backward
    N, D, ids = 32768, 768, 30522
    [summed] = passes(row_sums, "sum_rows", rows=_new(N, D), ids=_int64(N), count=ids)
    yield "`sum_rows`", f"{N:,} x {D} of {ids:,} ids", summed
    queries, rows, D, k = 4096, 65536, 512, 20
    found = called(lambda: functional.topk_similarity(_new(queries, D), _new(rows, D), k))
    yield "`topk_similarity`", f"{k} of {rows:,} x {D} for {queries:,}", found
    N, K, rows, D = 8192, 100, 65536, 512
    inputs = {"x": _new(N, D), "y": _new(rows, D), "ids": _int64(N, K), "scale": _float32()}
    forward, backward = passes(contrastive, "selected_logsumexp", **inputs)
    yield "`selected_logsumexp`", f"{K} of {rows:,} x {D} for {N:,}", forward
    yield "", "its backward pass", backward


def _vocabularies() -> Iterator[tuple[str, str, list[Work]]]:
    for N, D, V in ((4096, 768, 30522), (32768, 768, 30522), (8192, 4096, 128256)):
        rows = {"input": _new(N, D), "linear_weight": _new(V, D), "linear_bias": _new(0), "scale": _float32(1)}
        more = {"target": _int64(N), "row_weight": _float32(N), "normalize": False}
        work = passes(linear, "linear_cross_entropy", **rows, **more)[0]
        yield "`linear_cross_entropy`", f"{N:,} x {D:,} x {V:,}", work
    N, D, V = 4096, 768, 30522
    rows = {"input": _new(N, D), "linear_weight": _new(V, D), "linear_bias": _new(0), "scale": _float32(1)}
    work = passes(categorical, "linear_categorical", seed=_int64(), **rows)[0]
    yield "`linear_categorical`", f"{N:,} x {D} x {V:,}", work
    N, D, K = 4096, 256, 65536
    sides = {"student": _new(1, N, D), "teacher": _new(1, N, D)}
    sides |= {"student_prototypes": _new(K, D), "teacher_prototypes": _new(K, D), "center": _float32(K)}
    work = passes(distillation, "prototype_distillation_loss", **sides, weight=_float32(N), unlike_views=False)[0]
    yield "`prototype_distillation_loss`", f"{N:,} x {D} x {K:,}", work
    views = {"student": [_new(2, 64, K), _new(8, 64, K)], "teacher": [_new(2, 64, K)]}
    more = {"center": _float32(K), "weight": _float32(64)}
    work = passes(distillation, "distillation_loss", **views, **more, unlike_views=True)[0]
    yield "`distillation_loss` (DINO)", f"2 + 8 views, 64 x {K:,}", work
    views = {"student": [_new(1, N, 8192)], "teacher": [_new(1, N, 8192)]}
    more = {"center": _float32(8192), "weight": _float32(N)}
    work = passes(distillation, "distillation_loss", **views, **more, unlike_views=False)[0]
    yield "`distillation_loss` (iBOT)", f"{N:,} x 8,192", work
    for iterations in (1, 3):
        work = called(lambda n=iterations: functional.sinkhorn_center(_new(N, K), iterations=n))
        yield f"`sinkhorn_center`, {iterations} iteration{'s'[: iterations > 1]}", f"{N:,} x {K:,}", work


class Move(NamedTuple):
    """A CUDA C++ kernel: the bytes that it moves, in words; of which size; launches; bytes; comparisons of `rank`."""

    operation: str
    each: str
    size: str
    launches: int
    bytes: float
    comparisons: float = 0

    def work(self) -> list[Work]:
        """Of all launches together. A comparison takes four integer operations, of 32 bits."""
        return [Work(bytes=self.bytes, integers=4 * self.comparisons), *[Work()] * (self.launches - 1)]


def _moves() -> list[Move]:
    parameters = 86_000_000  # ViT-B/16
    B, L, K, D, P = 256, 196, 49, 768, 768  # MAE: images of 224 x 224, three of four patches masked
    ids, s = 8, 2  # bytes of an id, and of an element
    rows = f"{B} x {K} of {L}, D = {D}"
    masked, images = (L - K) * B * P, 4
    parts = B // 32  # partial sums of gradients
    sums = 4 * (parts * L * D + parts * -(-L // 8) * D)  # written, and read
    return [
        Move("ema_update_", "12 for each float32 parameter", "86 M parameters", 1, 12 * parameters),
        Move("adamw_ema_step_", "36 for each float32 parameter", "86 M parameters", 1, 36 * parameters),
        Move("enqueue_", "D (s + s') for each key", "4,096 x 128, float32", 2, 4096 * 128 * 8),
        Move(
            "masking_ids", "12 L + 8 K for each sample, and L^2 comparisons", f"{B} x {K} of {L}", 1,
            B * (12 * L + ids * K), B * L * 256,
        ),
        Move("gather_tokens", "(2 D s + 8) K for each sample", rows, 1, B * K * (2 * D * s + ids)),
        Move("scatter_tokens", "D s (K + L) + 8 K for each sample", rows, 1, B * (D * s * (K + L) + ids * K)),
        Move("restore_tokens", "D s (K + L) + 8 L for each sample", rows, 1, B * (D * s * (K + L) + ids * L)),
        Move(
            "restore_tokens_backward", "D s (2 K + L) + 16 L, and 8 D (L + L / 8) for 32 samples", rows, 4,
            B * (D * s * (2 * K + L) + 2 * ids * L) + 2 * sums,
        ),
        Move(
            "masked_patch_loss", "P (s + s') for each masked patch", f"{B} x {L}, P = {P}, float32 images", 1,
            masked * (s + images),
        ),
        Move(
            "masked_patch_loss_backward", "the same, and P s for every patch", "the same", 1,
            masked * (s + images) + B * L * P * s,
        ),
        Move("masked_feature_loss", "2 D s for each masked patch", f"{B} x {L}, D = {D}", 1, masked * 2 * s),
        Move("gather_patches", "2 P s + 8 for each patch", f"{B} x {K}, P = {P}", 1, B * K * (2 * P * s + ids)),
        Move(
            "scatter_patches", "P s (K + L) + 8 K for each image", f"{B} x {K} of {L}", 1,
            B * (P * s * (K + L) + ids * K),
        ),
    ]  # fmt: skip


MOVES = {move.operation: move for move in _moves()}


def _number(x: float) -> str:
    """Two digits."""
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if x >= size:
            return _digits(x / size) + prefix
    return _digits(x) if x else ""


def _digits(x: float) -> str:
    return f"{x:.0f}" if x >= 9.5 else f"{x:.1f}"


def _time(seconds: float) -> str:
    return f"{_digits(1e3 * seconds)} ms" if seconds >= 0.95e-3 else f"{_digits(1e6 * seconds)} µs"


def tables() -> list[str]:
    """Those of the page, in its order."""
    return ["\n".join(lines) for lines in (_of_pairs(), _of(_other_operations()), _of(_vocabularies()), _of_moves())]


def _head(*columns: str) -> list[str]:
    return [_row(*columns), "| --- " * len(columns) + "|"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _of_pairs() -> list[str]:
    lines = _head("operation", "pass", *["launches", "floor", "estimate"] * 2)
    small, large = ([losses_of_pairs(n, D) for D in (512, 128)] for n in (BATCH, N))
    for operation in large[0]:
        names = ("alone", "with gradients") if "softplus" in operation else ("forward", "backward")
        for i, name in enumerate(names):
            cells = [operation if i == 0 else "", name]
            for few, many in zip(small, large, strict=True):
                cost = cost_of(many[operation][i])
                launches = sorted({len(few[operation][i]), cost.launches})
                cells += [" to ".join(map(str, launches)), _time(cost.floor), _time(cost.estimate)]
            lines.append(_row(*cells))
    return lines


def _of(operations: Iterator[tuple[str, str, list[Work]]]) -> list[str]:
    lines = _head("operation", "size", "FLOP", "bytes", "launches", "floor", "estimate")
    for operation, size, work in operations:
        cost = cost_of(work)
        numbers = _number(cost.flops), _number(cost.bytes), str(cost.launches)
        lines.append(_row(operation, size, *numbers, _time(cost.floor), _time(cost.estimate)))
    return lines


def _of_moves() -> list[str]:
    lines = _head("operation", "bytes", "size", "in all", "launches", "floor", "estimate")
    for move in MOVES.values():
        cost = cost_of(move.work())
        numbers = _number(cost.bytes), str(cost.launches), _time(cost.floor), _time(cost.estimate)
        lines.append(_row(f"`{move.operation}`", move.each, move.size, *numbers))
    return lines


if __name__ == "__main__":
    print("\n\n".join(tables()))
