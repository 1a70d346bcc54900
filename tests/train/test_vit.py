"""The Vision Transformer: places of patches at other sizes, tokens of no patch, what makes deep ones trainable."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train import METHODS
from fastssl.train.networks.models import Timm
from fastssl.train.networks.vit import Layer, ViT, layers, patch_size_of, position_embedding


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_places_are_spread_over_the_same_square():
    torch.testing.assert_close(position_embedding((7, 7), 32, 7), position_embedding(7, 32))
    finer, own = position_embedding((21, 21), 32, 7).view(21, 21, 32), position_embedding(7, 32).view(7, 7, 32)
    torch.testing.assert_close(finer[1::3, 1::3], own)  # the middle ones of three lie where those of a coarser grid do
    coarser = position_embedding((1, 7), 32, 7)
    middle = own[3, :, 16:]
    torch.testing.assert_close(coarser[:, 16:], middle)


def test_places_are_those_of_interpolation():
    own = position_embedding(14, 64).view(14, 14, 64).permute(2, 0, 1)
    expected = F.interpolate(own[None], (10, 12), mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    found = position_embedding((10, 12), 64, 14)
    columns = torch.arange(4, 12)  # low frequencies, which bicubic interpolation can follow
    inside = torch.arange(120).view(10, 12)[2:-2, 2:-2].flatten()  # at the edge interpolation repeats the last one
    torch.testing.assert_close(found[inside][:, columns], expected[inside][:, columns], atol=5e-3, rtol=0)


def test_patches_grow_with_images():
    sizes = {20: 4, 28: 4, 32: 4, 64: 8, 72: 8, 96: 8, 100: 4, 112: 8, 128: 16, 200: 8, 224: 16, 384: 16}
    assert {size: patch_size_of(size) for size in sizes} == sizes
    for name in ("mae", "beit", "jepa", "data2vec", "ibot", "coca"):
        given = {"total_steps": 2, "local_size": 32}
        given = {key: given[key] for key in given if key in inspect.signature(METHODS[name]).parameters}
        assert METHODS[name](size=224, colours=3, **given).encoder.side == 14, name


@pytest.mark.parametrize("size", [(28, 28), (12, 12), (36, 20)])
def test_images_of_other_sizes(size):
    encoder, images = ViT(28, 4, 1, features=32, depth=1, class_token=True, registers=2), torch.rand(3, 1, *size)
    patches = size[0] * size[1] // 16
    tokens = encoder.embed(images)
    assert tokens.shape == (3, 1 + 2 + patches, 32)
    places = position_embedding((size[0] // 4, size[1] // 4), 32, 7)
    torch.testing.assert_close(tokens[:, 3:], encoder.patch_embed(images) + places)
    image, found = encoder.split(encoder.layers(tokens))
    assert image.shape == (3, 32) and found.shape == (3, patches, 32)
    torch.testing.assert_close(encoder(images), image)
    with pytest.raises(ValueError, match="4"):
        encoder(torch.rand(3, 1, 30, 28))


def test_class_token_and_registers_take_part():
    images = torch.rand(2, 1, 28, 28)
    encoder = ViT(28, 4, 1, features=32, depth=2, class_token=True, registers=3)
    encoder(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    plain = ViT(28, 4, 1, features=32, depth=2)
    assert plain(images).shape == (2, 49, 32) and plain.split(plain.embed(images))[0] is None


def test_mask_tokens_take_the_places_of_masked_patches():
    encoder, images, token = ViT(28, 4, 1, features=32, depth=1), torch.rand(2, 1, 28, 28), torch.randn(32)
    mask = (torch.rand(2, 49) < 0.5).float()
    tokens, whole = encoder.embed(images, mask=mask, mask_token=token), encoder.embed(images)
    hidden = mask.bool()
    torch.testing.assert_close(tokens[~hidden], whole[~hidden])
    torch.testing.assert_close(tokens[hidden], (token + encoder.pos_embed).expand(2, -1, -1)[hidden])


def test_drop_path_leaves_examples_as_they_are():
    stack = layers(3, 16, 2, drop_path=0.5)
    assert [layer.drop_path for layer in stack[:-1]] == [0, 0.25, 0.5]
    layer, tokens = Layer(16, 2, drop_path=0.5), torch.randn(400, 3, 16)
    with torch.no_grad():
        moved = layer(tokens) - tokens
        unmoved = (moved.abs().amax((1, 2)) == 0).float().mean().item()
        assert 0.18 < unmoved < 0.32  # by both parts of the layer
        layer.eval()
        whole = layer(tokens) - tokens
        assert (whole.abs().amax((1, 2)) > 0).all()
        layer.train().mlp[2].weight.zero_()
        layer.mlp[2].bias.zero_()
        moved = layer(tokens) - tokens
        expected = layer.eval()(tokens) - tokens
    stays = moved.abs().amax((1, 2)) > 0
    assert 0.4 < stays.float().mean() < 0.6
    torch.testing.assert_close(moved[stays], 2 * expected[stays])  # so that the mean is what evaluation has


def test_layer_scale_begins_where_it_is_told_and_is_learned():
    layer, tokens = Layer(16, 2, layer_scale=1e-5), torch.randn(4, 3, 16)
    assert 0 < (layer(tokens) - tokens).abs().max() < 1e-3
    layer(tokens).square().sum().backward()
    assert all(scale.grad.abs().sum() > 0 for scale in layer.scales)


def test_attention_is_softmax_of_scaled_products():
    layer, x = Layer(16, 2).eval(), torch.randn(2, 5, 16)
    y = layer.norms[0](x)
    q, k, v = F.linear(y, layer.attention.in_proj_weight, layer.attention.in_proj_bias).chunk(3, 2)
    q, k, v = (z.unflatten(2, (2, 8)).transpose(1, 2) for z in (q, k, v))
    mixed = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(3) @ v
    middle = x + layer.attention.out_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), middle + layer.mlp(layer.norms[1](middle)))


def test_timms_transformers_take_other_sizes(timm):
    encoder = Timm("vit_tiny_patch16_224", 64)
    assert encoder(torch.rand(2, 1, 32, 32)).shape == encoder(torch.rand(2, 3, 64, 64)).shape == (2, 192)
