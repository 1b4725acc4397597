"""The order of training rows."""

from __future__ import annotations

import numpy as np


def epoch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … rows-1 that is a function of the seed and the epoch alone, whatever the world
    size."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
