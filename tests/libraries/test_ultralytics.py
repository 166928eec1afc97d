"""A model of ultralytics, pruned, goes on in `YOLO`: it is trained, validated, predicts and is exported by it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import fxprune

SIDE = 64

# what a library warns of is its own
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def ultralytics(
    _torchvision_operators: object, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The ultralytics package, which looks nothing up and writes into a folder of its own."""
    os.environ.setdefault("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
    os.environ.setdefault("YOLO_OFFLINE", "1")
    os.environ.setdefault("YOLO_AUTOINSTALL", "0")
    found = pytest.importorskip("ultralytics")
    import torchvision
    from ultralytics.utils.nms import TorchNMS

    monkeypatch.setattr(torchvision.ops, "nms", TorchNMS.nms)  # a build for another torch has none
    return found


def drawn(folder: Path, count: int = 8) -> Path:
    """Squares of two colours on dark noise; returns the file that describes them."""
    cv2 = pytest.importorskip("cv2")
    numbers = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        image = numbers.integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
        x, y = (int(start) for start in numbers.integers(4, 40, 2))
        image[y : y + 20, x : x + 20] = (0, 255, 0) if i % 2 else (0, 0, 255)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        middle, size = f"{(x + 10) / SIDE} {(y + 10) / SIDE}", f"{20 / SIDE} {20 / SIDE}"
        (folder / "labels" / f"{i}.txt").write_text(f"{i % 2} {middle} {size}\n")
    described = folder / "data.yaml"
    described.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: red, 1: green}}\n")
    return described


def shrunk(model: Any, share: float) -> Any:
    """A model in its own class, with a share of its multiply-adds."""
    traced = fxprune.trace(model.eval(), torch.randn(2, 3, SIDE, SIDE), modes=("eval",))
    fxprune.prune.channels(traced, macs=share, runnable=model)
    return fxprune.write_back(fxprune.finalize(traced), model)


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_pruned_yolov8n_is_trained_exported_and_predicts_in_onnxruntime(ultralytics: Any, tmp_path: Path) -> None:
    from ultralytics.models.yolo.detect import DetectionTrainer

    yolo = ultralytics.YOLO("yolov8n.yaml")
    dense = size(yolo.model)
    for scores in yolo.model.model[-1].cv3:
        torch.nn.init.zeros_(scores[-1].bias)  # else nothing is seen after two epochs
    small = shrunk(yolo.model, 0.5)
    assert size(small) < dense / 2

    class Trainer(DetectionTrainer):  # the library's own would build the model of the yaml file again
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            return small

    data = drawn(tmp_path / "data")
    options: dict[str, Any] = {"imgsz": SIDE, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
    before = {name: value.clone() for name, value in small.state_dict().items()}
    yolo.train(trainer=Trainer, data=str(data), epochs=2, batch=4, amp=False, project=str(tmp_path / "runs"), **options)
    trained = yolo.model
    assert type(trained).__name__ == "DetectionModel"
    assert size(trained) == size(small)
    assert any(not torch.equal(before[name], value.to(before[name])) for name, value in trained.state_dict().items())
    yolo.val(data=str(data), **options)

    image = tmp_path / "data" / "images" / "0.png"
    predicted = yolo.predict(str(image), imgsz=SIDE, device="cpu", conf=0.01, verbose=False)[0].boxes
    assert len(predicted)
    path = yolo.export(format="onnx", imgsz=SIDE, device="cpu", simplify=False)
    x = torch.rand(1, 3, SIDE, SIDE)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = trained.float().eval()(x)[0]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
    assert len(ultralytics.YOLO(path).predict(str(image), imgsz=SIDE, device="cpu", conf=0.01, verbose=False)[0].boxes)

    # and by fxprune: the trained module is one to trace like any other
    final = fxprune.finalize(fxprune.trace(trained, x, modes=("eval",)))
    fxprune.export.to_onnx(final, tmp_path / "trained.onnx")


@pytest.mark.parametrize("name", ["yolo11n", pytest.param("yolov10n", marks=pytest.mark.slow)])
def test_attention_that_takes_its_width_from_the_input_comes_back_shrunk(ultralytics: Any, name: str) -> None:
    model = ultralytics.YOLO(f"{name}.yaml").model
    traced = fxprune.trace(model.eval(), torch.randn(2, 3, SIDE, SIDE), modes=("eval",))
    fxprune.prune.channels(traced, macs=0.6, runnable=model)
    final = fxprune.finalize(traced)
    small = fxprune.write_back(final, model)
    assert size(final) <= size(small) < 1.02 * size(final)
    x = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(small(x)[0], traced(x)[0])
