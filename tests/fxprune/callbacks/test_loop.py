"""Pruning within a loop of plain torch: steps, state, figures and what is made at the end."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import fxprune
from fxprune.callbacks import Pruning
from fxprune.errors import ArgumentError, ArgumentTypeError, ArtifactError, FxpruneError, FxpruneWarning
from tests.training_runs import assert_same_state, channel_schedule, examples, small_network, traced_network

images, labels = examples()


def optimizer_of(traced: fxprune.TracedModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(traced.parameters(), lr=1e-2)


def train(pruning: Pruning, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = slice(step % 4 * 8, step % 4 * 8 + 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(pruning.traced(images[batch]), labels[batch]).backward()
        optimizer.step()
        pruning.step()


def stored(*states: Any) -> list[Any]:
    """As a file of torch's gives them back."""
    file = io.BytesIO()
    torch.save(list(states), file)
    file.seek(0)
    found: list[Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("stopped_at", [7, 14])
def test_a_run_that_stops_goes_on_to_the_same_bits(stopped_at: int) -> None:
    whole = Pruning(channel_schedule(traced_network()))
    train(whole, optimizer_of(whole.traced), range(16))

    first = Pruning(channel_schedule(traced_network()))
    optimizer = optimizer_of(first.traced)
    train(first, optimizer, range(stopped_at))
    module, moments, state = stored(first.traced.state_dict(), optimizer.state_dict(), first.state_dict())
    assert json.loads(json.dumps(state)) == state

    again = Pruning(channel_schedule(traced_network()))
    again.traced.load_state_dict(module)
    optimizer = optimizer_of(again.traced)  # made after masks are there, as by trainers
    optimizer.load_state_dict(moments)
    again.load_state_dict(state)
    train(again, optimizer, range(stopped_at, 16))
    assert_same_state(again.traced, whole.traced)
    order = [name for name, _ in traced_network().named_parameters()]
    for traced in (again.traced, whole.traced):  # by which norms of gradients are added up
        assert [name.removesuffix("_orig") for name, _ in traced.named_parameters()] == order
    assert again.metrics() == whole.metrics()
    ours, theirs = again.finish(), whole.finish()
    assert ours is not None
    assert theirs is not None
    assert ours.macs == theirs.macs
    assert torch.equal(ours.final(images), theirs.final(images))


def _scaled_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int, limit: float = 0.0
) -> bool:
    """A step in float16, clipped by hand where there is a limit; returns whether the scaler let the optimizer step."""
    batch, scale = slice(step % 4 * 8, step % 4 * 8 + 8), scaler.get_scale()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        logits = module(images[batch])
    loss = nn.functional.cross_entropy(logits.float(), labels[batch]) * (float("inf") if step == 9 else 1.0)
    scaler.scale(loss).backward()
    if limit:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


def test_float16_with_a_scaler_that_skips_steps_is_torchs_own_training_with_clipping_and_masks_to_the_bit() -> None:
    method = torch.nn.utils.prune.L1Unstructured
    schedule = fxprune.Schedule(traced_network(), ["0.weight", "3.weight"], method, 0.6, start=2, stop=8, every=2)
    pruning, eager = Pruning(schedule), small_network().train()
    ours, theirs = (torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (pruning.traced, eager))
    clip = fxprune.clip_gradients(ours, max_norm=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=6) for _ in range(2)]
    skipped = []
    for step in range(18):
        last = clip.total_norm
        stepped = _scaled_step(pruning.traced, ours, scalers[0], step)
        assert stepped == _scaled_step(eager, theirs, scalers[1], step, limit=0.1)
        if not stepped:
            skipped.append(step)
            assert clip.total_norm is last
            continue
        pruning.step()
        for place in (0, 3):  # as many entries as are masked now, chosen by torch of the values after the step
            mask = dict(pruning.traced.named_buffers()).get(f"{place}.weight_mask")
            masked = 0 if mask is None else int((mask == 0).sum())
            there = getattr(eager[place], "weight_mask", torch.ones(()))
            if more := masked - int((there == 0).sum()):
                values = getattr(eager[place], "weight_orig", eager[place].weight)
                torch.nn.utils.prune.l1_unstructured(eager[place], "weight", more, importance_scores=values)
    assert skipped[0] == 0  # the first scale is too large for float16
    assert 9 in skipped
    assert pruning.schedule.reached == pytest.approx(0.6, abs=0.01)
    assert_same_state(pruning.traced, eager)


def test_figures_are_what_an_independent_count_finds() -> None:
    traced = traced_network()
    schedule = fxprune.Schedule(traced, "*.weight", torch.nn.utils.prune.L1Unstructured, 0.5, start=0)
    pruning = Pruning(schedule, name="net")
    assert pruning.metrics() == {"net/target": 0.0, "net/reached": 0.0, "net/density": 1.0}
    pruning.step()
    zeros = sum(int((buffer == 0).sum()) for name, buffer in traced.named_buffers() if name.endswith("_mask"))
    entries = sum(parameter.numel() for parameter in traced.parameters())
    found = pruning.metrics()
    assert found["net/target"] == 0.5
    assert found["net/reached"] == pytest.approx(0.5, abs=0.01)
    assert found["net/density"] == 1 - zeros / entries
    traced.get_buffer("0.weight_mask").zero_()
    assert pruning.metrics()["net/density"] < found["net/density"]


def test_the_end_writes_the_small_module_and_the_onnx_file_and_compares(tmp_path: Path) -> None:
    pruning = Pruning(channel_schedule(traced_network(), 3), folder=tmp_path / "out", onnx=True, compare=images)
    train(pruning, optimizer_of(pruning.traced), range(6))
    before = copy.deepcopy(pruning.traced.state_dict())
    finished = pruning.finish()
    assert finished is pruning.finished
    assert finished is not None
    assert finished.macs is not None
    assert 0.4 < finished.macs[1] / finished.macs[0] <= 0.5
    assert finished.parameters[1] == sum(parameter.numel() for parameter in finished.final.parameters())
    assert finished.comparison is not None
    assert finished.comparison.ok
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.fxp", "model.onnx"]
    wanted = copy.deepcopy(pruning.traced).eval()(images)
    session = onnxruntime.InferenceSession(finished.files["onnx"], providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-5)
    assert torch.equal(fxprune.load(finished.files["module"])(images), finished.final(images))
    metrics = pruning.metrics()
    assert metrics["fxprune/macs"] == finished.macs[1] / finished.macs[0]
    assert metrics["fxprune/parameters"] == finished.parameters[1] / finished.parameters[0]
    assert all(torch.equal(value, before[name]) for name, value in pruning.traced.state_dict().items())
    assert pruning.traced.training
    assert "MACs" in str(pruning)
    assert "model.onnx" in pruning.table()
    json.dumps(pruning.to_dict())


def test_nothing_is_made_where_nothing_is_asked_for() -> None:
    pruning = Pruning(channel_schedule(traced_network(), 2), finalize=False)
    for _ in range(3):
        pruning.step()
    assert pruning.finish() is None
    assert pruning.finished is None


def test_an_end_before_the_schedule_is_said() -> None:
    pruning = Pruning(channel_schedule(traced_network()))
    pruning.step()
    with pytest.warns(FxpruneWarning, match="training ended before the schedule: cubic to 0.5"):
        pruning.finish()


def test_weights_of_an_earlier_time_take_masks_off_and_the_end_says_so() -> None:
    pruning = Pruning(channel_schedule(traced_network(), 3))
    dense = copy.deepcopy(pruning.traced.state_dict())
    train(pruning, optimizer_of(pruning.traced), range(4))
    pruning.traced.load_state_dict(dense)
    assert pruning.metrics()["fxprune/density"] == 1.0
    wanted = traced_network().eval()
    wanted.load_state_dict(dense)
    assert torch.equal(copy.deepcopy(pruning.traced).eval()(images), wanted(images))
    with pytest.warns(FxpruneWarning, match="weights of an earlier time were loaded"):
        pruning.finish()


def test_a_state_without_the_masks_of_its_module_is_refused_and_nothing_changes() -> None:
    pruning = Pruning(channel_schedule(traced_network()))
    train(pruning, optimizer_of(pruning.traced), range(8))
    again = Pruning(channel_schedule(traced_network()))
    before = again.state_dict()
    with pytest.raises(ArtifactError, match="Load the state dict of the module that was saved with it first"):
        again.load_state_dict(pruning.state_dict())
    for other in ({}, {"schedule": {}, "decided": [], "masked": 0}, {**before, "decided": 3}, []):
        with pytest.raises(ArtifactError, match="no state of a"):
            again.load_state_dict(other)  # type: ignore[arg-type]
    assert again.state_dict() == before


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"onnx": True}, ArgumentError, "without a folder"),
        ({"finalize": False, "compare": True}, ArgumentError, "compare with finalize=False"),
        ({"finalize": False, "folder": "out"}, ArgumentError, "folder with finalize=False"),
        ({"finalize": "yes"}, ArgumentTypeError, "True, False or a dictionary"),
        ({"folder": 3}, ArgumentTypeError, "the path of a folder"),
        ({"name": ""}, ArgumentTypeError, "a text is needed"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], error: type[FxpruneError], told: str) -> None:
    schedule = channel_schedule(traced_network())
    with pytest.raises(error, match=told):
        Pruning(schedule, **options)


def test_a_module_in_place_of_its_schedule_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"a fxprune.Schedule is needed. Make one for it"):
        Pruning(traced_network())  # type: ignore[arg-type]


PACKAGES = ("lightning", "transformers", "accelerate")
IMPORTS = """
import importlib, importlib.util, sys
import fxprune.callbacks
found = {name.partition(".")[0] for name in sys.modules}
assert not found & {"lightning", "pytorch_lightning", "transformers", "accelerate"}, found
find = importlib.util.find_spec
hidden = {"lightning", "pytorch_lightning", "transformers", "accelerate"}
for broken in (False, True):
    if broken:
        importlib.util.find_spec = find
        sys.path.insert(0, sys.argv[1])
    else:
        importlib.util.find_spec = lambda name, package=None: None if name in hidden else find(name, package)
    for name in ("lightning", "transformers", "accelerate"):
        try:
            importlib.import_module(f"fxprune.callbacks.{name}")
        except fxprune.FxpruneError as error:
            print(error)
"""


def test_fxprune_imports_no_trainer_and_a_missing_or_broken_one_is_named_with_its_extra(tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    command = [sys.executable, "-c", IMPORTS, str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    missing, broken = told[:3], told[3:]
    for line, name in zip(missing, PACKAGES, strict=True):
        assert line == f"this needs {name}, which is not installed: pip install 'fxprune[{name}]'."
    for line, name in zip(broken, PACKAGES, strict=True):
        assert line.startswith(name)
        assert "is installed and cannot be imported: RuntimeError: operator nms does not exist." in line
        assert f"'fxprune[{name}]'" in line
