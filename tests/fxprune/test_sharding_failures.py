"""A process that fails or is lost while several work on one module: the others are told, and nothing is half done."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxprune
from tests import sharded_failures as failures
from tests.processes import SECONDS, in_processes, survivors


@pytest.mark.parametrize(
    "when", ["masks", *(pytest.param(when, marks=pytest.mark.slow) for when in ("channels", "save", "parts"))]
)
def test_a_process_that_ends_in_the_middle_leaves_a_named_error_and_no_file(when: str, tmp_path: Path) -> None:
    for found in survivors(2, 1, failures.left_by_one, when, str(tmp_path), seconds=20):
        assert found[when].startswith("ShardingError: "), found
        assert found["masked"] == "False"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["channels", "reconstruct", "save", "onnx", "parts"])
@pytest.mark.parametrize("lost", [0, 1])
def test_whichever_process_is_lost_the_others_end_with_a_named_error(when: str, lost: int, tmp_path: Path) -> None:
    for found in survivors(3, lost, failures.left_by_one, when, str(tmp_path), lost, seconds=20):
        assert found[when].startswith("ShardingError: "), found
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    for path in tmp_path.iterdir():  # what a lost process leaves
        with pytest.raises(fxprune.errors.ArtifactError):
            fxprune.load(path)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_is_told_to_all_and_leaves_the_checkpoint_of_before(tmp_path: Path) -> None:
    for found in in_processes(2, failures.with_a_full_disk, str(tmp_path)):
        assert found["parts"].startswith("ExportError: "), found
        assert found["what was there"] == "True"
        assert found["files"] == "['parts']"


FAILED_ALONE = {
    "memory of the whole": "MemoryError: no room",
    "memory of what goes": "MemoryError: no room",
    "a defect": "LookupError: a defect",
    "computing a part": "MemoryError: no room",
    "sums": "MemoryError: no room",
    "interrupted": "KeyboardInterrupt: ",
    "interrupted loader": "KeyboardInterrupt: ",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILED_ALONE)
def test_what_fails_on_the_first_process_alone_is_told_to_the_others_at_once(what: str, tmp_path: Path) -> None:
    first, other = in_processes(2, failures.failing_alone, what, str(tmp_path))
    assert first["raised"] == FAILED_ALONE[what]
    assert other["raised"] == f"ShardingError: on the first process: {FAILED_ALONE[what]}"
    for found in (first, other):
        assert float(found["seconds"]) < SECONDS / 2  # they do not wait for the time-out
        assert found["masked"] == "False"
        assert found["again"].startswith("NameLookupError: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("memory of what leaves", "MemoryError: no room"),
        ("memory of what comes", "MemoryError: no room"),
        ("interrupted transfer", "KeyboardInterrupt: "),
        ("a defect", "LookupError: a defect"),
        ("computing a part", "MemoryError: no room"),
        ("sums", "MemoryError: no room"),
        ("histogram", "MemoryError: no room"),
    ],
)
def test_what_fails_on_another_process_alone_is_told_to_all_at_once(what: str, told: str, tmp_path: Path) -> None:
    for rank, found in enumerate(in_processes(3, failures.failing_alone, what, str(tmp_path), 1)):
        assert found["raised"] == (told if rank == 1 else f"ShardingError: process 1 failed: {told}")
        assert float(found["seconds"]) < SECONDS / 2
        assert found["masked"] == "False"
        assert found["again"].startswith("NameLookupError: ")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["method", "global method"])
def test_a_method_that_fails_on_one_process_is_told_to_all_at_once(what: str, tmp_path: Path) -> None:
    for rank, found in enumerate(in_processes(3, failures.failing_alone, what, str(tmp_path), 1)):
        assert found["raised"].startswith("PruningError: " if rank == 1 else "ShardingError: process 1 failed: ")
        assert "MemoryError: no room" in found["raised"]
        assert float(found["seconds"]) < SECONDS / 2
        assert found["masked"] == "False"
        assert found["again"].startswith("NameLookupError: ")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_whatever_fails_on_one_process_in_any_call_ends_it_on_all_and_changes_nothing(failing: int) -> None:
    results = in_processes(2, failures.failing_in_each_call, failing, seconds=60)
    for what in failures.ALONE:
        for rank, found in enumerate(results):
            told, seconds, changed, works = found[what]
            assert "MemoryError: no room" in told, (what, rank, told)
            kind = getattr(fxprune.errors, told.partition(":")[0], None)
            assert rank == failing or issubclass(kind, fxprune.FxpruneError), (what, rank, told)
            assert seconds < 30, (what, rank, seconds)  # nobody waits for the time-out
            assert not changed, (what, rank, changed)
            assert works, (what, rank)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_batches_that_cannot_be_sent_are_told_to_all(failing: int, tmp_path: Path) -> None:
    for found in in_processes(2, failures.failing_alone, "no pickle", str(tmp_path), failing):
        assert found["raised"].startswith(f"ShardingError: the loader of process {failing} failed: ")
        assert "pickle" in found["raised"]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "failing"), [("file, full", 0), ("parts, memory", 0), ("parts, memory", 1)])
def test_what_fails_while_one_writes_is_told_to_all_and_leaves_no_file(what: str, failing: int, tmp_path: Path) -> None:
    for rank, found in enumerate(in_processes(2, failures.failing_alone, what, str(tmp_path), failing)):
        told = found["raised"]
        assert "no room" in told if what == "parts, memory" else told.startswith("ExportError: "), (rank, told)
        assert float(found["seconds"]) < SECONDS / 2
        assert found["again"].startswith("NameLookupError: ")
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.slow
def test_other_masks_on_other_processes_are_refused_by_all() -> None:
    for found in in_processes(2, failures.unequal_masks):
        for told in found.values():
            assert told.startswith(
                "ShardingError: 'head.weight_mask' of the state dict is not the same on every process"
            )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_are_asked_for_different_things_are_told_so_before_anything_is_done(processes: int) -> None:
    results = in_processes(processes, failures.asked_differently)
    assert all(found == results[0] for found in results)
    found = results[0]
    assert found.pop("changed") == "set()"
    assert found.pop("masked") == "True"  # they go on together
    last = f"process {processes - 1} at "
    assert "process 0 is at gathering a parameter, " in found["states"]
    assert "process 0 is at l1_unstructured(name='*.weight', amount=0.3), " in found["amount"]
    for what, call in {
        "amount": "l1_unstructured(name='*.weight', amount=0.4)",
        "names": "l1_unstructured(name='inner.weight', amount=0.3)",
        "calls": "finalize()",
        "global amount": "global_unstructured(names='*.weight', pruning_method=L1Unstructured, amount=0.2)",
        "budget": "channels(importance='l1', macs=0.5)",
        "align": "finalize(align=2)",
        "norm": "weight_norm(name='inner.weight', dim=1)",
        "schedule": "Schedule, global amount=0.5: L1Unstructured of stem.weight, ",
        "export": "to_onnx()",
        "parts": "save()",
        "states": "ending together",
    }.items():
        assert found.pop(what).startswith("ShardingError: the processes do different things: "), what
        assert last + call in results[1][what], what
    assert all("is not the same on every process" in told for told in found.values()), found
