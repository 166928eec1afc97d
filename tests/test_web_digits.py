"""The files of the page with the digits networks, which are committed."""

from __future__ import annotations

import pytest
import torch

from fxprune.demo.data import load_split
from fxprune.export import inspect
from tests.web_digits import PAGE, images, recorded, right


def test_the_files_are_what_the_page_says_of_them() -> None:
    digits = recorded()
    for name, told in digits["networks"].items():
        contents, path = inspect(PAGE / f"{name}.onnx"), PAGE / f"{name}.onnx"
        found = {"bytes": path.stat().st_size, "macs": contents.macs, "parameters": contents.parameters}
        assert found == told
    assert digits["networks"]["pruned"]["macs"] <= 0.3 * digits["networks"]["dense"]["macs"]
    assert len(digits["labels"]) == len(digits["images"]) == 599
    assert right("dense", digits) - right("pruned", digits) <= 6  # a point


def test_the_images_are_those_that_the_networks_were_not_trained_on() -> None:
    pytest.importorskip("sklearn")
    digits, (_, test) = recorded(), load_split(0)
    assert torch.equal(images(digits), test.images)
    assert digits["labels"] == test.labels.tolist()
