"""The benchmark for GPUs, on small networks and whatever device there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "networks", [["Llama block"], pytest.param(["ResNet-50", "ViT-B/16"], marks=pytest.mark.slow)], ids=" ".join
)
def test_every_network_is_measured_in_every_dtype_and_computes_the_same(networks: list[str]) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--networks", *networks]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "not reached" not in ran.stdout
    for network in networks:
        table = ran.stdout.partition(f"### {network}\n")[2].partition("###")[0]
        rows = {
            cells[0].strip(): cells[1:] for line in table.splitlines() if len(cells := line.strip("|").split("|")) > 2
        }
        assert {"dense", "masked", "finalized", "finalized, compiled", "finalized, onnxruntime"} <= rows.keys()
        assert all(cell.strip() for cell in rows["finalized"])
        assert 0.3 < float(rows["finalized"][0]) <= 0.5
