"""Models of timm and ultralytics by their names, with weights or with a warning that they are random."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fxprune.errors import ArgumentError, FxpruneWarning
from fxprune.recipes import sources

NETWORK = "timm:lcnet_035"


@pytest.fixture
def timm(_torchvision_operators: object) -> Any:
    """The timm package."""
    return pytest.importorskip("timm")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tag_brings_the_weights_of_timm(timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    name, trained = "lcnet_050.ra2_in1k", timm.create_model("lcnet_050")
    revision = tmp_path / "models--timm--lcnet_050.ra2_in1k"  # as the hub's own cache has it
    (revision / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (revision / "refs").mkdir()
    (revision / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_model(trained, str(revision / "snapshots" / ("0" * 40) / "model.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = sources.model(f"timm:{name}")
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in trained.state_dict().items())
    with pytest.raises(ArgumentError, match=r"'timm:lcnet_100.ra2_in1k' cannot be built by timm: LocalEntryNotFound"):
        sources.model("timm:lcnet_100.ra2_in1k")


def test_without_weights_a_warning_says_that_they_are_random(timm: Any, tmp_path: Path) -> None:
    with pytest.warns(FxpruneWarning, match=r"'timm:lcnet_035' has random weights"):
        found = sources.model(NETWORK)
    safetensors.torch.save_model(found, str(tmp_path / "w.safetensors"))
    again = sources.model(NETWORK, str(tmp_path / "w.safetensors"))  # without a warning
    assert torch.equal(again.get_parameter("conv_stem.weight"), found.get_parameter("conv_stem.weight"))


def test_a_model_that_timm_has_not_is_refused_with_near_names(timm: Any) -> None:
    with pytest.raises(ArgumentError, match=r"timm has no resnet17; it has .*resnet1"):
        sources.model("timm:resnet17")


@pytest.mark.usefixtures("_torchvision_operators")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_ultralytics_is_built_from_its_yaml(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
    os.environ.setdefault("YOLO_AUTOINSTALL", "0")
    pytest.importorskip("ultralytics")
    with pytest.warns(FxpruneWarning, match="has random weights"):
        assert type(sources.model("ultralytics:yolov8n.yaml")).__name__ == "DetectionModel"
    with pytest.raises(ArgumentError, match=r"'ultralytics:nowhere.yaml' cannot be built by ultralytics: FileNotFound"):
        sources.model("ultralytics:nowhere.yaml")
