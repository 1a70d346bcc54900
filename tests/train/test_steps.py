"""How runs are optimised: options that cannot be, clipping, mixed precision, LARS, and NaN."""

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train import Run
from fastssl.train.optimizers import LARS, make_optimizer
from tests.train.runs import new, run, tiny


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "many"}, TypeError, "steps must be an integer, got str"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got float"),
        ({"save_every": 0}, ValueError, "save_every must be positive, got 0"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be positive, got -1"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got str"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite, got nan"),
        ({"weight_decay": -1}, ValueError, "weight_decay must not be negative, got -1"),
        ({"layer_decay": None}, TypeError, "layer_decay must be a number, got NoneType"),
        ({"layer_decay": 2}, ValueError, "layer_decay must be above 0 and at most 1, got 2"),
        ({"clip": "short"}, TypeError, "clip must be a number, got str"),
        ({"amp": "yes"}, ValueError, "amp must be True, False or one of 'bfloat16', 'float16', got 'yes'"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        ({"optimizer": 3}, ValueError, "optimizer must be one of 'adamw', 'lars', got 3"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path or None, got int"),
        ({"resume": True}, ValueError, "resume needs a checkpoint, got None"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Run(**{"batch_size": 8, "steps": 1, **options})


def test_nan_stops_the_run_before_it_spoils_the_weights():
    def loss_of(bad):
        return lambda z: z.square().mean() if next(calls) < 2 else bad(z)

    for bad, message in [
        (lambda z: z.sum() * float("inf"), "m: in step 2 the loss is -?inf"),
        (lambda z: (z - z).abs().sqrt().sum(), "m: in step 2 the gradient of encoder.2.weight is NaN"),
    ]:
        calls = iter(range(9))
        method = tiny(loss=loss_of(bad))
        with pytest.raises(FloatingPointError, match=message):
            run(method)
        assert all(p.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}], ids=str)
def test_a_loss_may_leave_out_an_embedding(options):
    more = tiny(loss=lambda z, left_out: z.square().mean())
    forward = more.forward
    more.forward = lambda view: (*(z := forward(view)), 2 * z[0])
    assert run(more, 3, **options) == run(tiny(), 3, **options)


def test_gradients_are_clipped_to_a_norm(monkeypatch):
    norms = []

    def step(self):
        norms.append(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tiny(loss=lambda z: 100 * z.square().mean()), 2, clip=0.5)
    run(tiny(loss=lambda z: 1e-6 * z.square().mean()), 2, clip=0.5)
    assert norms[:2] == pytest.approx([0.5, 0.5], rel=1e-4) and 0 < max(norms[2:]) < 1e-3


def test_amp_runs_networks_in_bfloat16_and_keeps_weights_in_float32():
    dtypes = []
    method = tiny(loss=lambda z: dtypes.append(z.dtype) or z.float().square().mean())
    run(method, 1, amp=True)
    run(method, 1)
    assert dtypes == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in method.parameters()} == {torch.float32}


def test_lars_scales_each_layers_step_to_its_weights():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    optimizer = make_optimizer("lars", layer, 0.5, 0.1)
    velocity = 0
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.full((2, 3), 7.0), torch.full((2,), 7.0)
        optimizer.step()
        g = 7 + 0.1 * weight
        velocity = 0.9 * velocity + 1e-3 * weight.norm() / g.norm() * g
        weight = weight - 0.5 * velocity
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.bias.detach().double(), bias - 0.5 * 7 * (1 + 1.9), rtol=1e-6, atol=1e-6)
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], 1.0).step()
    torch.testing.assert_close(zero.detach(), -torch.ones(2, 2))


def test_biases_and_normalisation_do_not_decay():
    method = new("simclr")
    matrices, vectors = make_optimizer("adamw", method, 1e-3, 0.1).param_groups
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(method.parameters()))
    with pytest.raises(ValueError, match="optimizer must be one of 'adamw', 'lars', got 'sgd'"):
        make_optimizer("sgd", method, 1e-3, 0.1)
