"""Processes that die, or that are silent, do not leave the others waiting."""

from __future__ import annotations

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist

from fastssl.distributed import gather_rows, rank
from fastssl.functional import clip_loss, siglip_loss
from tests.distributed.processes import (
    SECONDS,
    all_views,
    needs_gloo,
    own_rows,
    run_processes,
)

pytestmark = needs_gloo


def _check_silence() -> None:
    """A process that makes no call, or no backward pass, is waited for as long as the group's timeout says."""
    x, y = (own_rows(x) for x in all_views()[0])
    for backward in (False, True):
        for loss in (clip_loss, siglip_loss):
            group = dist.new_group(timeout=datetime.timedelta(seconds=1))
            start = time.monotonic()
            value = loss(x, y, 2.0, group=group) if backward else None
            if rank() == 0:
                with pytest.raises(RuntimeError):
                    value.backward() if backward else loss(x, y, 2.0, group=group)
                assert time.monotonic() - start < SECONDS / 6
            dist.barrier()


def _check_that_fails() -> None:
    assert rank() != 1, "as it should"
    gather_rows(torch.ones(1, 1))


def _check_death() -> None:
    """A process that ends between the forward and the backward pass: nothing is wrong with it, but with the others."""
    x, y = (own_rows(x) for x in all_views()[0])
    value = clip_loss(x, y, 2.0, group=dist.group.WORLD)
    if rank() == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        value.backward()
    assert time.monotonic() - start < SECONDS / 6


def test_a_process_that_dies_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(Exception, match="as it should|Process 0 terminated"):  # whichever is heard of first
        run_processes(_check_that_fails, 2, tmp_path)
    assert time.monotonic() - start < SECONDS / 2


def test_a_process_that_dies_makes_the_others_raise(tmp_path):
    run_processes(_check_death, 3, tmp_path)


def test_silence_ends_with_the_timeout(tmp_path):
    run_processes(_check_silence, 2, tmp_path)
