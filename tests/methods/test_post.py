"""What happens to the logits of a picture after the windows, whatever the method."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import rand, randn
from oracles.post import propagated

from rfclip.methods import post
from rfclip.methods.post import propagate

SIZES = {  # names, logits, picture, and the size of the picture as given
    "odd": (5, (21, 33), (21, 33), (61, 83)),
    "cells of 2 x 3": (4, (17, 29), (48, 64), (131, 251)),
    "cells of 1 x 2": (3, (9, 40), (9, 40), (27, 163)),
    "one name": (1, (7, 5), (14, 10), (14, 10)),
    "one pixel high": (3, (1, 37), (1, 37), (1, 37)),
    "one pixel wide": (3, (20, 1), (20, 1), (43, 1)),
    "one pixel": (2, (1, 1), (1, 1), (1, 1)),
    "made smaller": (2, (40, 30), (40, 30), (13, 11)),
}


def inputs(names, logits, picture, dtype=torch.float64):
    """Cosines as CLIP has them, edges, and names of which some are alike."""
    image = randn(3, *picture, seed=1)
    image[:, picture[0] // 3 :, : picture[1] // 2] += 3
    text = F.normalize(randn(names, 8, seed=2) + 1, dim=-1)
    return (0.3 * rand(names, *logits, seed=3)).to(dtype), image.to(dtype), text.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("names, logits, picture, size", SIZES.values(), ids=SIZES)
def test_propagation(names, logits, picture, size, dtype, tolerance):
    """The error is a share of what the propagation changes."""
    given = inputs(names, logits, picture, dtype)
    before = [each.clone() for each in given]
    got = propagate(*given, size)
    want = propagated(*(each.double().numpy() for each in given), size)
    assert got.dtype == dtype and got.shape == want.shape
    change = np.abs(want - post._cells(given[0].double(), size).numpy()).max()
    assert np.abs(got.double().numpy() - want).max() <= tolerance * change + 1e-15
    assert (change > 0.01) == (size != (1, 1))
    assert all(map(torch.equal, given, before))
    assert torch.equal(propagate(*given, size), got)


def test_a_blank_picture():
    """Without edges, neighbours of one meaning are joined as closely as may be; nothing is divided by 0."""
    logits, _, text = inputs(3, (9, 12), (9, 12))
    image = torch.full((3, 9, 12), 0.7, dtype=torch.float64)
    got = propagate(logits, image, text, (31, 47))
    want = propagated(logits.numpy(), image.numpy(), text.numpy(), (31, 47))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    level = torch.full((3, 9, 12), 0.2)
    assert torch.equal(propagate(level, image, text, (31, 47)), torch.full((3, 31, 47), 0.2))


def test_in_bands(monkeypatch):
    given = inputs(4, (17, 29), (48, 64), torch.float32)
    want = propagate(*given, (131, 251))
    monkeypatch.setattr(post, "BAND", 300)
    assert torch.equal(propagate(*given, (131, 251)), want)
