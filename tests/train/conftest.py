"""What the trainer's tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Batches here are too small for threads to help, and waiting for each other on a busy machine is slow."""
    torch.set_num_threads(1)
