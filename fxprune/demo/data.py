"""The demo's data: 8 x 8 images of digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.errors import FxpruneError


class Digits(NamedTuple):
    """Images, float32 [N, 1, 8, 8] from 0 to 1, and their labels, int64 [N]."""

    images: Tensor
    labels: Tensor


def load_split(seed: int) -> tuple[Digits, Digits]:
    """Two thirds of scikit-learn's digits for training, one third to test; a seed gives the same ones.

    Raises:
        FxpruneError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise FxpruneError("the demo's data come with scikit-learn: pip install 'fxprune[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    own, test, own_labels, test_labels = train_test_split(
        images, labels, test_size=1 / 3, stratify=labels, random_state=seed
    )
    return _tensors(own, own_labels), _tensors(test, test_labels)


def _tensors(images: object, labels: object) -> Digits:
    return Digits(torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels))
