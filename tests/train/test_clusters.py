"""k-means: clusters that are apart are found, and the nearest centroid is the nearest one."""

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fastssl.train.clusters import assign, kmeans


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    places = 20 * torch.randn(4, 3, generator=generator)
    return places, (places.repeat(100, 1) + torch.randn(400, 3, generator=generator))


def test_centroids_are_means_of_their_rows():
    places, rows = blobs()
    centroids = kmeans(rows, 4, torch.Generator().manual_seed(1))
    nearest = assign(rows, centroids)
    assert torch.equal(nearest, torch.cdist(rows, centroids).argmin(1)) and len(nearest.unique()) == 4
    torch.testing.assert_close(centroids, torch.stack([rows[nearest == k].mean(0) for k in range(4)]))
    assert torch.cdist(places, centroids).amin(1).max() < 1
    assert torch.equal(centroids, kmeans(rows, 4, torch.Generator().manual_seed(1)))


def test_a_long_centroid_is_not_nearest_for_its_length():
    centroids = torch.tensor([[1.0, 0.0], [10.0, 0.0]])
    assert assign(torch.tensor([[2.0, 0.0], [7.0, 1.0]]), centroids).tolist() == [0, 1]


def test_centroids_without_rows_stay_and_too_many_are_refused():
    rows = torch.ones(5, 2)
    assert torch.equal(kmeans(rows, 3, torch.Generator().manual_seed(0)), torch.ones(3, 2))
    with pytest.raises(ValueError, match="clusters must be at most the number of rows, 5, got 6"):
        kmeans(rows, 6, torch.Generator().manual_seed(0))
