"""What the trainer's tests share."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Batches here are too small for threads to help, and waiting for each other on a busy machine is slow."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def control_c_interrupts():
    """As in a terminal, and not as in a shell's background, where it does nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def blob_places():
    """Kinds, rows and columns of 96 blobs."""
    rows, columns = torch.rand(2, 96, 1, 1, generator=torch.Generator().manual_seed(0)) * 14 + 7
    return torch.arange(96) % 4, rows, columns


@pytest.fixture(scope="session")
def blobs(blob_places):
    """Images of four kinds of blobs, at random places."""
    from fastssl.train import Images

    labels, rows, columns = blob_places
    width, grid = 2.0 + labels.view(-1, 1, 1), torch.arange(28.0)
    distance = (grid[:, None] - rows).square() + (grid - columns).square() * (1 + labels % 2).view(-1, 1, 1)
    pictures = (255 * (-distance / (2 * width.square())).exp()).to(torch.uint8)
    return Images("blobs", pictures[:64], labels[:64], pictures[64:], labels[64:])
