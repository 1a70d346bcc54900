"""A moving average and grad_cache in Accelerate's loop, with resume: the recipe of docs/integrations.md."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastssl import grad_cache
from fastssl.functional import nt_xent
from fastssl.nn import EMA

Accelerator = pytest.importorskip("accelerate").Accelerator


def train(model, optimizer, loader, steps, save_to=None, resume_from=None):
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    teacher = EMA(accelerator.unwrap_model(model), momentum=0.9, schedule="warmup")
    accelerator.register_for_checkpointing(teacher)
    if resume_from:
        accelerator.load_state(resume_from)
    for _, (x,) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        grad_cache((model, model), (x, x.flip(1)), nt_xent, chunk_size=4)  # accelerator.backward(loss) is in it
        optimizer.step()
        teacher.update(accelerator.unwrap_model(model))
    if save_to:
        accelerator.save_state(save_to)
    return teacher


def test_resume(tmp_path):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    first, second, plain = (copy.deepcopy(whole) for _ in range(3))
    x = torch.randn(40, 6)

    def arguments(model, x):
        return model, torch.optim.Adam(model.parameters(), lr=0.05), DataLoader(TensorDataset(x), batch_size=10)

    teacher = train(*arguments(whole, x), 4)
    train(*arguments(first, x[:20]), 2, save_to=tmp_path)
    resumed = train(*arguments(second, x[20:]), 2, resume_from=tmp_path)
    assert resumed.step == teacher.step == 4
    torch.testing.assert_close(resumed.state_dict(), teacher.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)

    _, optimizer, loader = arguments(plain, x)
    for (batch,) in loader:
        optimizer.zero_grad()
        nt_xent(plain(batch), plain(batch.flip(1))).backward()
        optimizer.step()
    torch.testing.assert_close(whole.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
