"""The Triton kernels of Barlow Twins and VICReg: values against float64, and the specialisations to compile."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import correlation
from fastssl.kernels.common.launch import DTYPES, ROWS
from fastssl.kernels.correlation import columns, derivatives, dual, primal, products
from fastssl.reference import correlation as reference
from tests.gpu.triton_checks.common import compile_gate
from tests.gpu.triton_checks.common.compile_gate import Case, Kernel
from tests.gpu.triton_checks.common.numerics import (
    DEVICE,
    INTERPRETED,
    PRECISIONS,
    THOROUGH,
    assert_as_accurate,
    far_apart,
    poisoned,
)

# Modules that a function of theirs has replaced in their package.
barlow_twins = import_module("fastssl.kernels.correlation.barlow_twins")
vicreg = import_module("fastssl.kernels.correlation.vicreg")

POINTERS = {
    **dict.fromkeys(("z", "z_a", "z_b", "other", "out"), "rows"),
    **dict.fromkeys(("left", "right", "operand", "other_operand", "weights"), "product"),
    **dict.fromkeys(("sums", "terms", "scale", "weight"), "fp64"),
    **dict.fromkeys(("offset", "rstd", "other_offset", "other_rstd", "slope", "peak", "dots"), "fp32"),
    **dict.fromkeys(("product", "products", "products_a", "products_b", "gram", "gram_a", "gram_b"), "fp32"),
    **dict.fromkeys(("inner", "squares", "grad_loss"), "fp32"),
}
NUMBERS = ("eps", "pull", "apart", "gram_weight", "reciprocal")
MULTIPLES = ("view_stride", "padded", "stride")
# The kernels over columns, and those that turn products into losses and weights; and what a launcher of Barlow Twins,
# or of VICReg, of one view or without what not every call needs, does not pass.
_CENTRED = {"rstd": None, "other_offset": None, "other_rstd": None}
_PRIMAL = {name: None for name in ("gram", "operand", "other_operand", "scale", "dots")}
_GRADIENTS = {
    "barlow_twins_dual": {"scale": None},
    "barlow_twins_primal": _PRIMAL,
    "vicreg_dual": {**_CENTRED, "scale": None},
    "vicreg_dual_scaled": _CENTRED,
    "vicreg_primal": {**_CENTRED, **_PRIMAL},
    "one_view_dual": {**_CENTRED, "other": None},
}
COLUMNS = {
    columns._statistics: {
        "barlow_twins": {"CROSS": "product"},
        "vicreg": {"CROSS": "difference"},
        "one_view": {"CROSS": None},
    },
    barlow_twins._barlow_twins_columns: {"": {}},
    vicreg._vicreg_columns: {"vicreg": {"CROSS": "difference"}, "one_view": {"CROSS": None}},
    products._standardise: {
        "barlow_twins": {"scale": None},
        "vicreg": {"rstd": None, "scale": None},
        "vicreg_scaled": {"rstd": None},
    },
    dual._gram: {
        "barlow_twins": {"scale": None},
        "barlow_twins_loss": {"scale": None, "gram_a": None, "gram_b": None},
        "vicreg": {"products_b": None, "gram_b": None, "scale": None},
        "vicreg_scaled": {"products_b": None, "gram_b": None},
        "vicreg_loss": {"products_b": None, "gram_a": None, "gram_b": None},
    },
    dual._diagonal: {"barlow_twins": {"scale": None}, "vicreg": {}},
    primal._weigh: {
        "barlow_twins": {"scale": None, "SYMMETRIC": False},
        "barlow_twins_loss": {"scale": None, "SYMMETRIC": False, "weights": None},
        "vicreg": {"SYMMETRIC": True, "scale": None},
        "vicreg_scaled": {"SYMMETRIC": True},
        "vicreg_loss": {"SYMMETRIC": True, "weights": None},
    },
    dual._round_gram: {"": {}},
    derivatives._gradient_sums: _GRADIENTS,
    derivatives._differentiate: _GRADIENTS,
}
_OF_PRODUCTS = {"out": "product"}  # where the output is an operand of the next product
_OUTPUTS = {products._standardise: _OF_PRODUCTS, dual._round_gram: _OF_PRODUCTS}


def cases(capability: int, sweep: bool) -> Iterator[Case]:
    if not sweep and capability != 90:
        return
    for function, variants in COLUMNS.items():
        kernel = Kernel(function, POINTERS | _OUTPUTS.get(function, {}), NUMBERS, MULTIPLES)
        for precision, rows in compile_gate.DTYPES if sweep else [("float16", "fp16")]:
            sizes = {"T": products.TILE, "SLOTS": columns.SLOTS, **columns.BLOCK, "TF32": precision == "tf32"}
            for variant, constants in variants.items():
                constants = {name: x for name, x in (constants | sizes).items() if name in function.arg_names}
                warps = barlow_twins.WARPS if function is barlow_twins._barlow_twins_columns else 4
                yield Case(kernel, variant, capability, precision, rows, tuple(constants.items()), warps)


EPS = {"tf32": 2.0**-10, "bfloat16": 2.0**-7, "float16": 2.0**-10}
OPERATIONS = ["barlow_twins", "vicreg", "variance_covariance"]
DIMS = [2, 3, 17, 33, 64, 65, 127, 129, 200]
PRIMAL = [(n, d) for n in DIMS for d in DIMS] if THOROUGH else [*zip(DIMS, DIMS[3:] + DIMS[:3], strict=True)]
DUAL = [(2, 3), (3, 17), (17, 33), (33, 65), (64, 127), (65, 129), (127, 200), (129, 270), (200, 300)]
# Loss weights of such sizes that no part of the loss hides another.
PARAMS = {"barlow_twins": (1.0, 0.05), "vicreg": (25.0, 25.0, 10.0), "variance_covariance": (25.0, 10.0)}

if INTERPRETED:
    columns.BLOCK.update(BR=128, BD=128)
    dual.TILE = primal.TILE = 128


@pytest.fixture(autouse=True)
def narrow_panels(monkeypatch):
    """More than one panel in small matrices."""
    monkeypatch.setattr(primal, "PANEL", ROWS)


def views(rows: int, dim: int, dtype: torch.dtype = torch.float32, size: float = 1.0, noise: float = 0.5):
    """Two views of random rows: columns of different means and deviations, some of them above 1, correlated."""
    generator = torch.Generator().manual_seed(1000 * rows + dim)
    first, second, third = torch.randn(3, rows, dim, generator=generator)
    deviation, mean = 0.3 + 1.2 * torch.rand(dim, generator=generator), torch.randn(dim, generator=generator)
    first = first + 0.5 * first.roll(1, 1)
    pair = first, first + noise * second + 0.2 * third
    return tuple((size * (deviation * z + mean)).to(DEVICE, dtype) for z in pair)


def fused(
    operation: str,
    z: tuple[Tensor, ...],
    params: tuple[float, ...],
    dual: bool,
    precision: str = "float32",
    eps: float = 1e-5,
    unbiased: bool = False,
    grad: float = 1.0,
) -> dict[str, Tensor]:
    """The parts of an operation's loss and the gradients, by the launchers; what they leave unwritten is NaN."""
    z = z[:1] if operation == "variance_covariance" else z
    options = *params, eps, unbiased, dual
    g = torch.tensor(grad, device=DEVICE)
    with poisoned():
        result = getattr(correlation, operation)(*z, *options, True, precision)
        parts, kept = result[: -len(z)], result[-len(z) :]
        again = getattr(correlation, operation)(*z, *options, False, precision) if precision == "float32" else ()
        gradients = getattr(correlation, f"{operation}_backward")(g, *z, *kept, *options, precision)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    rows, dim = z[0].shape
    for x in (*parts, *again):
        assert x.dtype == torch.float32
    for x, y in zip(parts, again, strict=False):
        assert x.shape == () and torch.equal(x.nan_to_num(), y.nan_to_num())
    width = rows if dual else dim
    assert all(x.shape == (rows, width) and x.is_contiguous() for x in kept)
    assert all(x.shape == (0, width) for x in again[-len(z) :])
    assert all(x.dtype == z[0].dtype and x.shape == (rows, dim) and x.is_contiguous() for x in gradients)
    names = {"barlow_twins": ["invariance", "redundancy"], "vicreg": ["invariance", "variance", "covariance"]}
    names = ["loss", *names.get(operation, ["variance", "covariance"])]
    return dict(zip(names, parts, strict=True)) | {f"dz{i}": x for i, x in enumerate(gradients)}


def eager(
    operation: str,
    z: tuple[Tensor, ...],
    params: tuple[float, ...],
    dtype: torch.dtype,
    eps: float = 1e-5,
    unbiased: bool = False,
    grad: float = 1.0,
) -> dict[str, Tensor]:
    """The same of the naive formula in `dtype`."""
    z = [x.detach().to(dtype).requires_grad_() for x in (z[:1] if operation == "variance_covariance" else z)]
    options, parts = {"eps": eps, "unbiased": unbiased}, {}
    if operation == "barlow_twins":
        parts["invariance"] = reference.barlow_twins(*z, lambda_param=0.0, **options)
        parts["redundancy"] = reference.redundancy_loss(*z, **options)
    else:
        if operation == "vicreg":
            parts["invariance"] = F.mse_loss(*z)
        parts["variance"] = sum(reference.variance_loss(x, **options) for x in z) / len(z)
        parts["covariance"] = sum(reference.covariance_loss(x, unbiased=unbiased) for x in z)
    loss = sum(weight * part for weight, part in zip(params, parts.values(), strict=True))
    gradients = torch.autograd.grad(loss, z, torch.tensor(grad, dtype=dtype, device=DEVICE))
    parts = {name: x.detach() for name, x in ({"loss": loss} | parts).items()}
    return parts | {f"dz{i}": x for i, x in enumerate(gradients)}


def compare(operation: str, z: tuple[Tensor, ...], dual: bool, precision: str = "float32", **options):
    """Errors against float64 are at most twice eager's in the dtype of the products, and rounding."""
    params = options.pop("params", PARAMS[operation])
    ours = fused(operation, z, params, dual, precision, **options)
    exact = eager(operation, z, params, torch.float64, **options)
    theirs = eager(operation, z, params, DTYPES[precision], **options)
    floor = {name: 16 * torch.finfo(torch.float32).eps * exact[name].norm().item() for name in ours}
    for name in floor:
        # Products, and the gradients, are rounded; eager, which does not know TF32 here, may be lucky with few numbers.
        if precision != "float32" and name not in ("invariance", "variance"):
            floor[name] += EPS[precision] * exact[name].norm().item()
    assert_as_accurate(ours, exact, theirs, floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rows,dim,dual", [*((*s, False) for s in PRIMAL), *((*s, True) for s in DUAL)])
def test_sizes(rows, dim, dual, operation, precision):
    if not THOROUGH:
        if operation == "variance_covariance" and rows not in (33, 129):
            pytest.skip("VICReg's kernels, in a sweep only")
        other = ("bfloat16", "float16")[(rows + (operation == "vicreg")) % 2]
        if precision == other or (precision != "float32" and rows in (2, 33, 65, 200)):
            pytest.skip("most of the short precisions, in a sweep only")
    # Of two rows the standardised columns are 1 and -1, but for eps, and their gradients 0.
    eps = 0.1 if rows == 2 else 1e-5
    compare(operation, views(rows, dim, DTYPES[precision]), dual, precision, eps=eps)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rows,dim,dual", [(33, 20, False), (20, 33, True)])
def test_options(rows, dim, dual, operation):
    z = views(rows, dim)
    compare(operation, z, dual, unbiased=True, eps=0.1, grad=-3.0)
    compare(operation, views(rows, dim, noise=0.0), dual)
    for without in range(len(PARAMS[operation])):
        params = tuple(0.0 if i == without else x for i, x in enumerate(PARAMS[operation]))
        last = params[-1] == 0
        ours, exact = (f(operation, z, params, x) for f, x in ((fused, dual), (eager, torch.float64)))
        for name, value in ours.items():
            skipped = last and name in ("redundancy", "covariance")
            torch.testing.assert_close(
                value.double(), 0 * exact[name] if skipped else exact[name], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_float32_columns_with_short_products(dual, operation, precision):
    """Of any size: float16 holds neither the squares of large columns nor the products of small ones."""
    for size in (1e-3, 1.0, 1e3):
        z, params = views(40, 70, size=size), (0.0,) * (len(PARAMS[operation]) - 1) + (1.0,)
        if operation == "barlow_twins" and size < 1:
            continue  # eps is not small there
        ours, exact = fused(operation, z, params, dual, precision), eager(operation, z, params, torch.float64)
        for name, value in ours.items():
            bound = EPS[precision] * exact[name].norm()
            assert (value.double() - exact[name]).norm() <= bound, (name, size)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("rows,dim,dual", [(40, 24, False), (24, 40, True)])
def test_columns_far_from_zero(rows, dim, dual, operation):
    z = tuple(x + 1000 for x in views(rows, dim))
    z[0][:, 3] = 0.1  # constant
    z[1][:, 5] = 1000.1
    compare(operation, z, dual)
    constant = tuple(x[:1].expand(rows, dim) for x in z)
    ours = fused(operation, constant, PARAMS[operation], dual)
    for name in ("redundancy", "covariance", "dz0", "dz1"):
        if operation != "vicreg" or not name.startswith("dz"):
            assert not ours.get(name, torch.zeros(())).any()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_feature(operation):
    z = views(9, 1)
    compare(operation, z, False)
    ours = fused(operation, z, PARAMS[operation], False)
    assert ours.get("redundancy", ours.get("covariance")) == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_small_off_diagonal(operation):
    """Of columns that are nearly uncorrelated the diagonal must not reach the sum of squares."""
    walsh = torch.ones(1, 1)
    for _ in range(6):
        walsh = torch.cat([torch.cat([walsh, walsh], 1), torch.cat([walsh, -walsh], 1)])
    clean = walsh[:, 1:41].to(DEVICE)
    z = tuple(clean + 1e-4 * x for x in views(64, 40))
    ours, exact = fused(operation, z, PARAMS[operation], False), eager(operation, z, PARAMS[operation], torch.float64)
    name = "redundancy" if operation == "barlow_twins" else "covariance"
    assert 0 < exact[name] < 1e-4
    torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dual", [False, True])
def test_strides(operation, dual):
    a, b = views(33, 40)
    wide = torch.full((66, 81), float("nan"), device=DEVICE)
    strided = a.T.contiguous().T, wide[::2, 1:81:2].copy_(b)
    expected = fused(operation, (a, b), PARAMS[operation], dual)
    for inputs in (strided, strided[::-1]):
        ours = fused(operation, inputs, PARAMS[operation], dual)
        other = expected if inputs is strided else fused(operation, (b, a), PARAMS[operation], dual)
        for name, value in ours.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(value, dual, operation):
    z = views(20, 33)
    z[0][4, 7] = value
    ours = fused(operation, z, PARAMS[operation], dual)
    exact = eager(operation, z, PARAMS[operation], torch.float64)
    assert ours["loss"].isnan()
    for name, x in ours.items():
        assert torch.equal(x.isfinite(), exact[name].isfinite()), name


@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_slots_of_rows_and_panels_of_columns(operation, monkeypatch):
    """Many rows are summed in several slots; and C is made in one panel or in several."""
    compare(operation, views(300, 24), False)
    compare(operation, views(24, 520), True)
    monkeypatch.setattr(primal, "PANEL", 2 * ROWS)
    compare(operation, views(60, 300), False)
    monkeypatch.setattr(columns, "PROGRAMS", 1)
    compare(operation, views(24, 520), True)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dual", [False, True])
def test_same_bits_every_time(dual, operation):
    z = views(130, 40, torch.bfloat16)
    first, second = (fused(operation, z, PARAMS[operation], dual, "bfloat16") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


def test_offsets_beyond_32_bits():
    a, b = views(3, 8, torch.float16)
    for operation in OPERATIONS:
        expected = fused(operation, (a, b), PARAMS[operation], True, "float16")
        for name, value in fused(operation, (far_apart(a), b), PARAMS[operation], True, "float16").items():
            assert torch.equal(value, expected[name])
