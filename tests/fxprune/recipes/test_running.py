"""Carrying recipes out: the files, the folder, what was killed, what cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import recipes
from fxprune.errors import ArgumentError
from tests.recipe_networks import images, network, score

TABLES: dict[str, Any] = {
    "seed": 7,
    "model": {"source": "tests.recipe_networks:network"},
    "data": {"source": "tests.recipe_networks:batches"},
    "reparametrize": [{"kind": "weight_norm", "names": "3.weight"}],
    "choose": {"macs": 0.5},
    "train": {"function": "tests.recipe_networks:train"},
    "compare": {"score": "tests.recipe_networks:score", "latency": False},
}
STAGES = ["trace", "reparametrize", "choose", "repair", "train", "finalize", "export", "compare"]
PLAIN: dict[str, Any] = {
    "model": {"source": "tests.recipe_networks:network", "inputs": ["2x1x8x8"]},
    "choose": {"macs": 0.5, "importance": "l2"},
    "repair": {"enabled": False},
    "export": {"onnx": False},
    "compare": {"latency": False},
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, recipes.Outcome]:
    """A recipe of all stages, carried out in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, recipes.run(recipes.parsed(TABLES), folder)


def told(outcome: recipes.Outcome) -> Any:
    """What an outcome says, but for times."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(each) for key, each in value.items() if not key.endswith("seconds")}
        return [without(each) for each in value] if isinstance(value, list) else value

    return without(outcome.to_dict())


def test_every_stage_runs_and_the_files_hold_what_is_left(whole: tuple[Path, recipes.Outcome]) -> None:
    folder, outcome = whole
    assert list(outcome.stages) == STAGES
    assert outcome.macs is not None
    assert outcome.macs[1] <= 0.5 * outcome.macs[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.fxp", "model.onnx", "model.safetensors", "report.html", "report.json",
    ]  # fmt: skip
    final, x = fxprune.load(folder / "model.fxp"), images(4)
    assert fxprune.compare(final, folder / "model.onnx", inputs=x).ok
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(outcome.to_dict()))
    scores = outcome.stages["compare"]["score"]
    assert scores == [pytest.approx(score(network())), pytest.approx(score(final), rel=1e-5)]


@pytest.mark.parametrize(
    "killed",
    [
        pytest.param(STAGES[1:], id="at each stage in turn"),
        *(pytest.param([stage], id=stage, marks=pytest.mark.slow) for stage in STAGES[1:]),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_result_bit_for_bit(
    whole: tuple[Path, recipes.Outcome], tmp_path: Path, killed: list[str]
) -> None:
    recipe, began = recipes.parsed(TABLES), list[str]()
    for stage in killed:

        def killing(name: str, place: int, count: int, last: str = stage) -> None:
            assert count == len(STAGES)
            if name == last:
                raise Killed
            began.append(name)

        with pytest.raises(Killed):
            recipes.run(recipe, tmp_path, step=killing)
        assert began == STAGES[: STAGES.index(stage)]
    outcome = recipes.run(recipe, tmp_path, step=lambda name, *_: began.append(name))
    assert began == STAGES
    assert told(outcome) == told(whole[1])
    wanted, found = (fxprune.load(folder / "model.fxp").state_dict() for folder in (whole[0], tmp_path))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_a_budget_out_of_reach_is_reported_and_leaves_nothing_else(tmp_path: Path) -> None:
    outcome = recipes.run(recipes.parsed(PLAIN | {"choose": {"macs": 0.0001, "importance": "l2"}}), tmp_path)
    assert outcome.failure is not None
    assert "cannot be reached" in outcome.failure
    assert json.loads((tmp_path / "report.json").read_text())["failure"] == outcome.failure
    assert not list(tmp_path.glob("model.*"))


def test_a_folder_that_cannot_be_made_written_or_read_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    recipe = recipes.parsed(PLAIN)
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(ArgumentError, match=r"notes.out' was to be the folder for the files; it cannot be written: "):
        recipes.run(recipe, tmp_path / "notes" / "out")
    for method, what in (("mkdir", "written"), ("iterdir", "read")):
        (folder := tmp_path / method).mkdir()
        with monkeypatch.context() as patch, pytest.raises(ArgumentError, match=f"cannot be {what}: .*denied"):
            patch.setattr(Path, method, denied)
            recipes.run(recipe, folder)
        assert not list(folder.iterdir())


def test_a_folder_with_other_files_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ArgumentError, match=r"is not empty: thesis.tex"):
            recipes.run(recipes.parsed(PLAIN), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_first_stage_that_fails_or_is_killed_leaves_the_folder_to_any_recipe(tmp_path: Path) -> None:
    broken = PLAIN | {"model": {"source": "tests.recipe_networks:broken", "inputs": ["2x1x8x8"]}}
    with pytest.raises(RuntimeError, match="no weights at hand"):
        recipes.run(recipes.parsed(broken), tmp_path)
    assert list(tmp_path.iterdir()) == []
    without_data = {
        **PLAIN,
        "model": {"source": PLAIN["model"]["source"]},
        "data": {"source": str(tmp_path / "none.npz")},
    }
    for recipe, error in ((broken, RuntimeError), (without_data, ArgumentError)):
        with pytest.raises(error, match=r"no weights|none\.npz"):
            recipes.run(recipes.parsed(recipe), tmp_path / "out" / "of this run")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".stages").mkdir()
    (tmp_path / ".stages" / "trace.fxp").write_bytes(b"half")
    assert recipes.run(recipes.parsed(PLAIN), tmp_path).failure is None
    assert not (tmp_path / ".stages").exists()


def test_a_finished_folder_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    recipes.run(recipes.parsed(PLAIN), tmp_path)
    with pytest.raises(ArgumentError, match="ask to overwrite it"):
        recipes.run(recipes.parsed(PLAIN), tmp_path)
    outcome = recipes.run(
        recipes.parsed(PLAIN | {"choose": {"macs": 0.7, "importance": "l2"}}), tmp_path, overwrite=True
    )
    assert json.loads((tmp_path / "report.json").read_text())["recipe"]["choose"]["macs"] == 0.7
    assert outcome.failure is None


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("")
    with pytest.raises(ArgumentError, match="it is a file"):
        recipes.run(recipes.parsed(PLAIN), path)


def test_a_step_of_another_recipe_is_not_gone_on_from(tmp_path: Path) -> None:
    def killing(name: str, *_: int) -> None:
        if name == "finalize":
            raise Killed

    with pytest.raises(Killed):
        recipes.run(recipes.parsed(PLAIN), tmp_path, step=killing)
    other = recipes.parsed(PLAIN | {"choose": {"macs": 0.7, "importance": "l2"}})
    with pytest.raises(ArgumentError, match="is not empty"):
        recipes.run(other, tmp_path)
    began: list[str] = []
    recipes.run(other, tmp_path, step=lambda name, *_: began.append(name), overwrite=True)
    assert began[0] == "trace"


def test_random_numbers_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    recipes.run(recipes.parsed(PLAIN), tmp_path)
    assert torch.equal(torch.rand(3), wanted)


def test_what_fits_no_class_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(final: nn.Module, model: nn.Module) -> nn.Module:
        raise fxprune.errors.WriteBackError("the class fixes a size")

    monkeypatch.setattr("fxprune.recipes.stages.write_back", refused)
    outcome = recipes.run(recipes.parsed(PLAIN), tmp_path)
    assert outcome.stages["export"]["own_class"] == {"written": False, "why": "the class fixes a size"}
    assert "the class fixes a size" in str(outcome)
