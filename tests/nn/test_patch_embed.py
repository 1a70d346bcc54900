"""The embedding of patches as a module: timm's, and with fewer patches."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.nn import PatchEmbed
from tests.distributed.processes import mean_of_all, run_processes

pytestmark = pytest.mark.usefixtures("device")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pair(timm, **options) -> tuple[nn.Module, nn.Module]:
    """timm's and ours, of the same parameters."""
    theirs, ours = timm.layers.PatchEmbed(**options), PatchEmbed(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _assert_alike(theirs: nn.Module, ours: nn.Module) -> None:
    """What timm's models read."""
    for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "strict_img_size", "dynamic_img_pad"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.output_fmt == ours.output_fmt
    for scalar in (True, False):
        assert ours.feat_ratio(scalar) == theirs.feat_ratio(scalar)
    for size in ((32, 48), (33, 47)):
        assert ours.dynamic_feat_size(size) == theirs.dynamic_feat_size(size)


def test_patch_embed_module(backend):
    """With timm's parameters, on images and on videos."""
    images, ids = _normal(2, 3, 32, 48), torch.tensor([[5, 0], [3, 4]])
    module = PatchEmbed((32, 48), 16, embed_dim=20)
    assert module.grid_size == (2, 3) and module.num_patches == 6 and module.patch_size == (16, 16)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "proj.weight": (20, 3, 16, 16),
        "proj.bias": (20,),
    }
    tokens = module.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(images), tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        module(images, ids), tokens.gather(1, ids[:, :, None].expand(-1, -1, 20)), rtol=1e-4, atol=1e-5
    )
    video = PatchEmbed(32, (16, 8), 2, 20, tubelet_size=2, bias=False)
    clips = _normal(2, 2, 4, 32, 32)
    tokens = video.proj(clips).flatten(2).transpose(1, 2)
    torch.testing.assert_close(video(clips), tokens, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in video.named_parameters()] == ["proj.weight"] and tokens.shape[1] == 2 * video.num_patches


def test_checkpoints_of_timm_load(timm):
    theirs, ours = timm.layers.PatchEmbed(32, 8, 3, 20), PatchEmbed(32, 8, 3, 20)
    ours.load_state_dict(theirs.state_dict())
    images = _normal(2, 3, 32, 32)
    assert (ours.img_size, ours.grid_size, ours.num_patches) == (theirs.img_size, theirs.grid_size, theirs.num_patches)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_patch_embed_compiles(backend):
    module, images = PatchEmbed((8, 12), 4, embed_dim=5), _normal(2, 3, 8, 12).requires_grad_()
    ids = torch.tensor([[5, 0, 1], [3, 4, 4]])
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        tokens = function(images, ids)
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), (images, *module.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "patch_size": (8, 4)},
        {"flatten": False},
        {"flatten": False, "norm_layer": partial(nn.GroupNorm, 4)},
        {"norm_layer": partial(nn.LayerNorm, eps=1e-6)},
        *({"output_fmt": output_fmt} for output_fmt in ("NCHW", "NHWC", "NCL", "NLC")),
        {"output_fmt": "NHWC", "norm_layer": nn.LayerNorm, "dtype": torch.float64, "device": "cpu"},
        {"strict_img_size": False},
        {"strict_img_size": False, "dynamic_img_pad": True},
        {"img_size": None, "dynamic_img_pad": True, "output_fmt": "NHWC"},
        {"img_size": None},
    ],
    ids=str,
)
def test_arguments_of_timm(options, timm):
    theirs, ours = _pair(timm, **{"img_size": (32, 16), "patch_size": 8, "in_chans": 2, "embed_dim": 20, **options})
    _assert_alike(theirs, ours)
    sizes = [(32, 16)]
    if ours.img_size is None or not ours.strict_img_size:
        sizes += [(16, 24), (33, 15)] if ours.dynamic_img_pad else [(16, 24)]
    for size in sizes:
        images = _normal(3, 2, *size).to(ours.proj.weight.dtype)
        expected, tokens = theirs(images), ours(images)
        assert tokens.shape == expected.shape and torch.equal(tokens, expected)
    for change in ({"img_size": (16, 24)}, {"patch_size": (4, 8)}, {"img_size": 40, "patch_size": 10}, {}):
        theirs.set_input_size(**change)
        ours.set_input_size(**change)
        _assert_alike(theirs, ours)
        images = _normal(3, 2, *(ours.img_size or (40, 80))).to(ours.proj.weight.dtype)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("vit_tiny_patch16_224", {}, [(64, 64)]),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, [(64, 64), (96, 48)]),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, [(70, 50)]),
        ("vit_base_patch32_clip_224", {}, [(64, 64)]),
        ("deit_tiny_distilled_patch16_224", {}, [(64, 64)]),
        ("vit_relpos_small_patch16_224", {}, [(64, 64)]),
        ("samvit_base_patch16_224", {"output_fmt": "NHWC", "strict_img_size": False}, [(64, 64), (64, 96)]),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "img_size": 56}, [(56, 56)]),
    ],
)
def test_models_of_timm(name, options, sizes, timm):
    layer = PatchEmbed
    if "output_fmt" in options:
        layer, options = partial(PatchEmbed, **options), {}
    options = {"img_size": 64, **options} if "swin" in name else {"img_size": 64, "depth": 1, **options}
    theirs, ours = timm.create_model(name, **options), timm.create_model(name, embed_layer=layer, **options)
    assert isinstance(ours.patch_embed, PatchEmbed)
    ours.load_state_dict(theirs.state_dict())
    for size in sizes:
        images = _normal(2, 3, *size)
        results = []
        for model in (theirs.eval(), ours.eval()):
            features = model(images).square().sum()
            results.append((features, *torch.autograd.grad(features, model.patch_embed.parameters())))
        torch.testing.assert_close(results[1], results[0])
    if hasattr(theirs, "set_input_size"):
        size = 112 if "swin" in name else 128
        for model in (theirs, ours):
            model.set_input_size(img_size=(size, size))
        images = _normal(1, 3, size, size)
        torch.testing.assert_close(ours(images), theirs(images))


def test_proj_is_called_as_a_module():
    """So that hooks run, and what takes its place does."""
    module, calls = PatchEmbed(16, 8, 3, 4), []
    module.proj.register_forward_hook(lambda *_: calls.append(1))
    module(_normal(2, 3, 16, 16)).sum().backward()
    assert calls == [1]
    module.proj = nn.Sequential(module.proj, nn.Dropout2d(1.0))
    assert not module(_normal(2, 3, 16, 16)).any()


def test_export():
    """The program has none of this package's operations, as other runtimes do not."""
    module, images = PatchEmbed(16, 8, 3, 4), _normal(2, 3, 16, 16)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    assert "fastssl" not in str(program.graph)
    images = _normal(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), module(images))


@pytest.mark.parametrize("options", [{}, {"output_fmt": "NHWC"}, {"norm_layer": nn.LayerNorm}])
def test_visible_patches_are_those_of_all(options):
    module, images = (
        PatchEmbed(16, 4, 3, 8, dynamic_img_pad=True, strict_img_size=False, **options),
        _normal(2, 3, 15, 9),
    )
    every = module(images).reshape(2, 12, 8)
    ids = torch.tensor([[0, 11, 3], [7, 2, 2]])
    visible = module(images, ids)
    torch.testing.assert_close(visible, every.gather(1, ids[:, :, None].expand(-1, -1, 8)), rtol=1e-4, atol=1e-5)


def test_another_patch_size_of_videos():
    """A resized patch has about the token that the patch had."""
    module = PatchEmbed(16, 4, 2, 6, tubelet_size=2)
    with torch.no_grad():
        smooth = nn.functional.interpolate(_normal(6 * 2 * 2, 1, 2, 2), size=4, mode="bicubic")
        module.proj.weight.copy_(smooth.view(6, 2, 2, 4, 4))
    module.proj.bias.requires_grad_(False)
    clips = nn.functional.interpolate(_normal(1, 2, 4, 4, 4), size=(4, 16, 16), mode="trilinear")
    expected = module(clips)
    module.set_input_size(32, 8)
    assert module.grid_size == (4, 4) and module.proj.weight.requires_grad and not module.proj.bias.requires_grad
    larger = nn.functional.interpolate(clips, size=(4, 32, 32), mode="trilinear")
    torch.testing.assert_close(module(larger), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: PatchEmbed(8, 4, output_fmt="NWC"), ValueError, "output_fmt must be None, 'NCHW', .*, got 'NWC'"),
        (lambda: PatchEmbed(8, 4, flatten=False, tubelet_size=2), ValueError, "output_fmt must be .*got 'NCHW'"),
        (lambda: PatchEmbed(8, 4).set_input_size(9), ValueError, r"img_size must be a multiple of .*got \(9, 9\)"),
        (lambda: PatchEmbed(8, 4).set_input_size(patch_size=3), ValueError, r"img_size must be a multiple .*\(3, 3\)"),
        (lambda: PatchEmbed(8, 4, flatten=False)(torch.ones(1, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64)),
         ValueError, "ids_keep must be None where output_fmt is 'NCHW', got a tensor"),
        (lambda: PatchEmbed(8, 4, strict_img_size=False)(torch.ones(1, 3, 9, 8)), ValueError,
         r"images must have sizes that are multiples of \(4, 4\), got \(9, 8\)"),
        (lambda: PatchEmbed(8, 4)(torch.ones(3, 8, 8)), ValueError, r"images must have shape \(B, C, H, W\), got"),
        (lambda: PatchEmbed(8, 4)([1.0]), TypeError, "images must be a Tensor, got list"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_size_that_is_refused_changes_nothing():
    module = PatchEmbed(8, 4)
    with pytest.raises(ValueError):
        module.set_input_size(12, 8)
    assert (module.img_size, module.patch_size, module.grid_size) == ((8, 8), (4, 4), (2, 2))
    assert module.proj.weight.shape[-2:] == (4, 4)


def _check_sharded() -> None:
    """A step of a model that FSDP shards is that of the model on all images, of all patches and of some."""
    from torch.distributed.fsdp import fully_shard

    images, ids = _normal(4, 3, 8, 8), torch.tensor([[0, 3], [2, 2], [1, 0], [3, 1]])
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    torch.manual_seed(2)
    model = PatchEmbed(8, 4, embed_dim=6)
    whole, by_layers = copy.deepcopy(model), copy.deepcopy(model)
    fully_shard(model)
    fully_shard(by_layers.proj)
    for sharded, some in ((model, True), (model, False), (by_layers, False)):
        loss = sharded(images[mine], ids[mine] if some else None).square().mean()
        loss.backward()
        expected = whole(images, ids if some else None).square().mean()
        expected.backward()
        torch.testing.assert_close(mean_of_all(loss), expected.detach())
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
            ours.grad = theirs.grad = None
    with pytest.raises(ValueError, match="proj must not be sharded by itself"):
        by_layers(images[mine], ids[mine])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")
def test_sharded_parameters(tmp_path):
    run_processes(_check_sharded, 2, tmp_path)
