"""The digits networks of the page in docs, and its images, for onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxprune.export import Session

PAGE = Path(__file__).parents[1] / "docs" / "demo"


def recorded() -> dict[str, Any]:
    """What the page knows: labels and images of the test digits, and the sizes of both networks."""
    found: dict[str, Any] = json.loads((PAGE / "digits.json").read_text(encoding="utf-8"))
    return found


def images(digits: dict[str, Any]) -> torch.Tensor:
    values = [[16 if value == "g" else int(value, 16) for value in image] for image in digits["images"]]
    return torch.tensor(values).float().reshape(-1, 1, 8, 8) / 16


def logits(name: str, inputs: torch.Tensor) -> np.ndarray:
    return next(iter(Session(PAGE / f"{name}.onnx").run(inputs).values())).numpy()


def right(name: str, digits: dict[str, Any]) -> int:
    return int((logits(name, images(digits)).argmax(1) == np.array(digits["labels"])).sum())
