"""Mixtures of experts whose rows are sorted by expert are written to ONNX, and compute there what eager does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import fxprune
from fxprune.export.translation import translations


@pytest.mark.filterwarnings("ignore")
def test_rows_times_the_matrix_of_their_expert_equal_eager_at_other_sizes_and_with_experts_without_rows(
    tmp_path: Path, transformers: Any
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        **sizes, vocab_size=60, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, use_cache=False
    )
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(3, 60, (2, 7))
    traced = fxprune.trace(model, {"input_ids": ids}, modes=("eval",))
    assert translations(traced.graph)
    fxprune.export.to_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (torch.randint(3, 60, (5, 7)), ids[:1, :1].expand(1, 7)):  # the second: two experts take all
        (found,) = session.run(None, {"input_ids": batch.numpy()})
        np.testing.assert_allclose(found, model(batch).logits.detach().numpy(), rtol=1e-4, atol=1e-5)
