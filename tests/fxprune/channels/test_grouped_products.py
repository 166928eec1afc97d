"""Mixtures of experts as transformers stores them: a parameter holds the matrices of all, data says whose."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.graph.interpretation import run
from fxprune.graph.names import tensor_at

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 40, (2, 8))
GATES, DOWN = "model.layers.{}.mlp.experts.gate_up_proj", "model.layers.{}.mlp.experts.down_proj"


@pytest.fixture
def model(transformers: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config).eval()


def traced(model: Any) -> fxprune.TracedModule:
    return fxprune.trace(model, {"input_ids": IDS}, modes=("eval",))


def test_widths_that_are_dead_in_every_expert_go_and_others_stay(model: Any) -> None:
    with torch.no_grad():
        gates = model.get_parameter(GATES.format(0))
        gates[:, 3], gates[1:, 5], gates[:, 16 + 7] = 0, 0, 0  # 5 lives in the first expert
        model.get_parameter(DOWN.format(1))[:, :, 2] = 0
    plain = traced(model)
    final = fxprune.finalize(plain, align=1)
    assert final.plan is not None
    gone = {name: set(range(16)) - set(kept[2].tolist()) for name, kept in final.plan.kept.items() if "down" in name}
    assert gone == {DOWN.format(0): {3, 7}, DOWN.format(1): {2}}
    assert final.plan.kept[GATES.format(0)][1].tolist() == [i for i in range(32) if i % 16 not in (3, 7)]
    for ids in (IDS, torch.randint(3, 40, (3, 8))):
        expected, found = (
            run(m.graphs["eval"], functools.partial(tensor_at, m), [ids], torch.float64)[0] for m in (plain, final)
        )
        assert expected.dtype == torch.float64
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_each_row_counts_with_the_one_matrix_that_it_meets(model: Any) -> None:
    plain = traced(model)
    tokens, experts, hidden, width, words = 8, 2, 32, 16, 40
    attention = 4 * tokens * hidden * hidden + 2 * tokens * tokens * hidden
    layer = attention + tokens * hidden * 4 + tokens * experts * 3 * hidden * width
    report = fxprune.prune.channels(plain, targets=["model.layers.0.mlp.experts.*"], amount=0.5, round_to=1)
    assert report.macs[0] == 2 * layer + tokens * hidden * words
    assert report.macs[1] == report.macs[0] - tokens * experts * 3 * hidden * width // 2


def test_what_is_chosen_for_the_class_fits_its_kernels_and_comes_back_through_a_folder(
    model: Any, tmp_path: Path
) -> None:
    plain = traced(model)
    fxprune.prune.channels(plain, 0.4, round_to=1, kinds="channel", runnable=model)
    small: Any = fxprune.write_back(fxprune.finalize(plain), model)
    width = small.config.intermediate_size
    assert width in (4, 8, 12)
    assert small.get_parameter(DOWN.format(0)).shape == (4, 32, width)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(IDS).logits, plain(input_ids=IDS).logits, atol=1e-6)


def test_in_bfloat16_the_products_are_torchs_and_are_counted_and_exported_alike(model: Any, tmp_path: Path) -> None:
    single, narrow = traced(model), traced(model.to(torch.bfloat16))
    assert torch.ops.aten._grouped_mm.default in {node.target for node in narrow.graph.nodes}
    counted = [fxprune.prune.channels(each, 0.5).macs[0] for each in (single, narrow)]
    assert counted[0] == counted[1]
    written = fxprune.export.to_onnx(narrow, tmp_path / "model.onnx")
    assert written.comparison is not None
    assert written.comparison.ok
