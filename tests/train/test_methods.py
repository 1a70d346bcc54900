"""The trainer's methods: that they are what their papers say, and that their twins with naive kernels agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from rich.console import Console

from fastssl.train import METHODS, Images, Method, Run, create, fit, twins
from fastssl.train.networks.vit import position_embedding

QUIET = Console(quiet=True)
IMAGE_METHODS = [name for name, method in METHODS.items() if method.load is Method.load]
STEPS = 4


@pytest.fixture
def images(blobs) -> Images:
    return blobs


def new(name: str, seed: int = 0, **options) -> Method:
    torch.manual_seed(seed)
    return create(name, STEPS, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(method: Method, images: Images, rows: int = 16) -> tuple[torch.Tensor, ...]:
    return method.views(method.training_data(images)[torch.arange(rows)], generator())


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_twins_agree(name, images):
    both = twins(new(name))
    history = fit(both, both["naive"].training_data(images), Run(batch_size=32, steps=STEPS), console=QUIET)
    losses = {impl: torch.tensor([step.loss for step in steps]) for impl, steps in history.items()}
    # Before the first update they differ by rounding; training amplifies that.
    torch.testing.assert_close(losses["fastssl"][0], losses["naive"][0], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(losses["fastssl"], losses["naive"], rtol=0.01, atol=1e-3)
    assert all(not steps[-1].health.collapse for steps in history.values())
    weights, others = (both[impl].state_dict() for impl in ("fastssl", "naive"))
    assert all(torch.allclose(weights[key].float(), others[key].float(), atol=0.03) for key in weights)


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_inputs_are_reproducible(name, images):
    method = new(name)
    inputs, again = inputs_of(method, images), inputs_of(method, images)
    assert all(torch.equal(x, y) and len(x) == 16 for x, y in zip(inputs, again, strict=True))
    other = method.views(method.training_data(images)[torch.arange(16)], generator(1))
    assert not torch.equal(inputs[0], other[0])


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_everything_that_is_trained_gets_a_gradient(name, images):
    method = new(name)
    method.loss(*method(*inputs_of(method, images))).backward()
    trained = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())
    assert all(p.grad is None for key, p in method.named_parameters() if "teacher" in key)


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_losses_are_float32_under_amp(name, images):
    method = new(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(*method(*inputs_of(method, images)))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_moco_is_cross_entropy_of_the_key_among_the_queue(name, images):
    method = new(name, temperature=0.1, momentum=0.75, queue=40)
    view1, view2 = inputs_of(method, images)
    query, key = method(view1, view2)
    assert query.requires_grad and not key.requires_grad
    torch.testing.assert_close(query, F.normalize(method.student(view1), dim=1))
    queue = method.queue.keys.clone()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.1
    torch.testing.assert_close(method.loss(query, key), F.cross_entropy(logits, torch.zeros(16, dtype=torch.int64)))
    with torch.no_grad():
        method.encoder[0].weight += 1
    before = method.teacher.module[0][0].weight.clone()
    method.after_step(query.detach(), key)
    torch.testing.assert_close(method.teacher.module[0][0].weight, 0.75 * before + 0.25 * method.encoder[0].weight)
    torch.testing.assert_close(method.queue.keys, torch.cat([key, queue[16:]]))


def test_moco_v2_has_a_deeper_head_and_other_views(images):
    v1, v2 = new("moco_v1"), new("moco_v2")
    assert [len(method.projector) for method in (v1, v2)] == [1, 4]
    assert not torch.equal(inputs_of(v1, images)[0], inputs_of(v2, images)[0])


def byol_parts(method, images):
    view1, view2 = inputs_of(method, images)
    both = torch.cat([view1, view2])
    predictions = method.predictor(method.projector(method.encoder(both))).chunk(2)
    with torch.no_grad():
        return predictions, method.teacher(both).chunk(2)


def test_byol_is_the_distance_from_the_teachers_projection_of_the_other_view(images):
    method = new("byol", momentum=0.5)
    embeddings = method(*inputs_of(method, images))
    assert [z.requires_grad for z in embeddings] == [True, True, False, False]
    (p1, p2), (t1, t2) = byol_parts(method, images)
    expected = sum(
        (F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1).mean() for p, t in ((p1, t2), (p2, t1))
    )
    torch.testing.assert_close(method.loss(*embeddings), expected)


@pytest.mark.parametrize("name", ["byol", "moco_v3"])
def test_momentum_rises_to_one_in_the_course_of_the_run(name, images):
    method = new(name)
    momenta = []
    method.after_step = lambda *_: momenta.append(method.teacher.update(method.student))
    fit({name: method}, images.train, Run(batch_size=16, steps=STEPS), console=QUIET)
    start = method.teacher.momentum
    assert momenta == pytest.approx([1 - (1 - start) * (1 + math.cos(math.pi * k / STEPS)) / 2 for k in range(STEPS)])


def test_moco_v3_is_the_papers_pseudocode(images):
    method = new("moco_v3", temperature=0.3)
    (q1, q2), (k1, k2) = byol_parts(method, images)

    def ctr(q, k):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        return 2 * 0.3 * F.cross_entropy(q @ k.T / 0.3, torch.arange(len(q)))

    torch.testing.assert_close(method.loss(*method(*inputs_of(method, images))), ctr(q1, k2) + ctr(q2, k1))


def test_simsiam_is_the_papers_pseudocode_and_stops_the_gradient(images):
    method = new("simsiam")
    z1, z2 = method.projector(method.encoder(torch.cat(inputs_of(method, images)))).chunk(2)
    p1, p2 = method.predictor(torch.cat([z1, z2])).chunk(2)

    def distance(p, z):
        return -(F.normalize(p, dim=1) * F.normalize(z.detach(), dim=1)).sum(1).mean()

    expected = (distance(p1, z2) + distance(p2, z1)) / 2
    loss = method.loss(*method(*inputs_of(method, images)))
    torch.testing.assert_close(loss, expected)
    weights = [method.encoder[0].weight, method.predictor[0].weight]
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))


def test_sup_con_learns_from_labels(images):
    method = new("sup_con", temperature=0.2)
    view1, view2, labels = inputs_of(method, images)
    projections, _ = method(view1, view2, labels)
    assert torch.equal(labels, images.train_labels[:16])
    torch.testing.assert_close(torch.cat(projections.unbind(1)), method.student(torch.cat([view1, view2])))
    z, label = F.normalize(projections.flatten(0, 1), dim=1), labels.repeat_interleave(2)
    logits = (z @ z.T / 0.2).fill_diagonal_(-math.inf)
    positive = (label[:, None] == label).fill_diagonal_(False)
    expected = -(logits.log_softmax(1).where(positive, 0).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(method.loss(projections, labels), expected)


def test_mae_sees_only_what_is_not_masked_and_is_judged_where_it_is(images):
    method = new("mae", norm_pix_loss=False)
    pictures, ids_keep, ids_restore, mask = inputs_of(method, images)
    assert ids_keep.shape == (16, 12) and mask.sum(1).eq(37).all()
    pixels = mask.view(16, 7, 7).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    assert torch.equal(mask.gather(1, ids_keep), torch.zeros(16, 12))
    prediction, targets, _ = method(pictures, ids_keep, ids_restore, mask)
    hidden = torch.where(pixels == 1, torch.rand_like(pictures), pictures)
    torch.testing.assert_close(method(hidden, ids_keep, ids_restore, mask)[0], prediction)
    seen = torch.where(pixels == 0, torch.rand_like(pictures), pictures)
    assert not torch.allclose(method(seen, ids_keep, ids_restore, mask)[0], prediction)
    painted = F.fold(prediction.transpose(1, 2), (28, 28), 4, stride=4)
    expected = ((painted - targets).square() * pixels).sum() / pixels.sum()
    torch.testing.assert_close(method.loss(prediction, targets, mask), expected)


def test_beit_tells_the_codes_of_hidden_patches_and_does_not_see_them(images):
    torch.manual_seed(0)
    method = create("beit", STEPS, images, codes=8)
    pictures, mask, codes = inputs_of(method, images)
    assert mask.sum(1).eq(20).all() and torch.equal(codes < 0, mask == 0)
    patches = F.unfold(pictures, 4, stride=4).transpose(1, 2)[mask == 1]
    distances = torch.cdist(patches, method.centroids)
    torch.testing.assert_close(distances.gather(1, codes[mask == 1, None])[:, 0], distances.amin(1))
    assert distances.amin(1).mean() < 0.5 * torch.cdist(patches, patches.mean(0, keepdim=True)).mean()  # by k-means
    features, _ = method(pictures, mask, codes)
    expected = F.cross_entropy(method.head(features).flatten(0, 1), codes.flatten())
    torch.testing.assert_close(method.loss(features, codes), expected)
    pixels = mask.view(16, 7, 7).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    changed = torch.where(pixels == 1, torch.rand_like(pictures), pictures)
    torch.testing.assert_close(method(changed, mask, codes)[0], features)
    changed = torch.where(pixels == 0, torch.rand_like(pictures), pictures)
    assert not torch.allclose(method(changed, mask, codes)[0][mask == 1], features[mask == 1])


def test_mae_puts_tokens_back_in_their_places(images):
    """A patch that all tokens know nothing of but their own pixels and place comes out where it went in."""
    method = new("mae", mask_ratio=0.5)
    method.encoder.layers, method.decoder = nn.Identity(), nn.Identity()
    pictures, ids_keep, ids_restore, mask = inputs_of(method, images)
    tokens, *_ = method(pictures, ids_keep, ids_restore, mask)
    expected = method.to_decoder(method.encoder(pictures)) + method.pos_embed
    torch.testing.assert_close(tokens[mask == 0], expected[mask == 0])
    torch.testing.assert_close(tokens[mask == 1], (method.mask_token + method.pos_embed).expand_as(tokens)[mask == 1])


def test_position_embedding_tells_all_places_and_is_alike_for_neighbours():
    places = F.normalize(position_embedding(7, 48), dim=1)
    similarity = (places @ places.T).view(7, 7, 7, 7)
    assert similarity.flatten(0, 1).flatten(1).fill_diagonal_(0).max() < 0.999
    assert similarity[3, 3, 3, 4] > similarity[3, 3, 3, 6] and similarity[3, 3, 4, 3] > similarity[3, 3, 6, 3]
    torch.testing.assert_close(similarity[3, 3, 3, 5], similarity[3, 3, 5, 3])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_draws_what_it_has_learnt(images, norm_pix_loss, tmp_path):
    pytest.importorskip("matplotlib")
    method, path = new("mae", norm_pix_loss=norm_pix_loss), tmp_path / "new" / "pictures.png"
    method.pictures(images, path)
    assert path.read_bytes().startswith(b"\x89PNG") and method.training
