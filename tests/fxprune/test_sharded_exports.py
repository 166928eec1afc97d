"""Files of sharded modules: those of one process, written weight by weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import sharded_exports as exports
from tests import sharded_networks as networks
from tests.processes import in_processes


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "spread"), [(2, networks.by_fsdp), (4, networks.by_replicas)])
def test_weights_come_one_at_a_time_to_the_file_of_one_process(
    processes: int, spread: exports.Spread, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    module = networks.traced()
    largest = max(tensor.nbytes for tensor in module.state_dict().values())
    want, _ = exports.exported(networks.plain, str(tmp_path / "one"))
    (got, counts), *_ = in_processes(processes, exports.exported, spread, str(tmp_path / "two"))
    assert got.keys() == want.keys()
    for what, weights in want.items():
        assert got[what].keys() == weights.keys(), what
        for name, value in weights.items():
            assert torch.allclose(got[what][name].double(), value.double(), rtol=0, atol=1e-6), f"{what}: {name}"
    beside = {path.name.partition("-")[0] for path in (tmp_path / "two").glob("*.onnx.data")}
    assert {"masked", "normed"} <= beside
    assert not [*(tmp_path / "one").glob("*.onnx.data")]
    assert len(counts) == len(want)
    for what, own in zip(want, counts, strict=True):
        whole = 9 * 6 * 4 if what == "captured again" else largest
        assert whole <= own.wholes <= 2 * whole, what
        assert own.gathered > whole


@pytest.mark.slow
def test_what_is_left_of_tensor_parallel_weights_is_whole_and_written_as_in_one_process(tmp_path: Path) -> None:
    for name in ("one", "four"):
        (tmp_path / name).mkdir()
    want = exports.over_tensor_parallel(networks.plain, str(tmp_path / "one"))
    found = in_processes(4, exports.over_tensor_parallel, networks.by_tensor_parallel, str(tmp_path / "four"))
    for what, state in want.items():
        assert found[0][what].keys() == state.keys(), what
        for name, value in state.items():
            assert torch.allclose(found[0][what][name], value, rtol=0, atol=1e-6), f"{what}: {name}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_other_forms_are_written_from_files_and_no_process_holds_the_module(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    want = exports.other_forms(networks.plain, str(tmp_path / "one"))
    (found, _) = in_processes(2, exports.other_forms, networks.by_fsdp, str(tmp_path / "two"))
    largest = 2**22
    for name, (_, output) in want.items():
        held, own = found[name]
        assert torch.allclose(own, output, rtol=0, atol=1e-5), name
        assert largest / 2 < held < 3 * largest, name  # of twelve
