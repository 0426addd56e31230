"""What the loop learns from and is judged by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Images:
    """`pixels` uint8 [N, S, S, C] of a whole data set version, `labels` int64 [N], and the rows of two splits."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
