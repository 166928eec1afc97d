"""An eager model and its traced twin, compared bit for bit: what the tests of torch's reparametrizations share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import TracedModule, prune

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
MIXED = ("eval", "train", "eval", "eval", "train", "train", "eval")


def leaves(output: Any) -> list[Any]:
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return pytree.tree_leaves(output)


def call(model: nn.Module, mode: str, args: tuple[Any, ...], seed: int = 0) -> list[Any]:
    model.train(mode == "train")
    torch.manual_seed(seed)
    return leaves(model(*args))


def assert_same(got: Any, want: Any, what: str) -> None:
    """Same bits, dtype, shape and memory format; NaN equals NaN."""
    if not isinstance(want, Tensor):
        assert got == want, what
        return
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), what
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_same_state(traced: nn.Module, eager: nn.Module, what: str) -> None:
    """Same names in the same order, values, requires_grad, buffers (persistent or not)."""
    got, want = traced.state_dict(), eager.state_dict()
    assert list(got) == list(want), what
    for name in want:
        assert_same(got[name], want[name], f"{what}: {name}")
    assert [(n, p.requires_grad) for n, p in traced.named_parameters()] == [
        (n, p.requires_grad) for n, p in eager.named_parameters()
    ], what
    buffers = dict(traced.named_buffers())
    for name, buffer in eager.named_buffers():
        assert_same(buffers[name], buffer, f"{what}: {name}")


def assert_same_calls(traced: nn.Module, eager: nn.Module, args: tuple[Any, ...], modes: Sequence[str] = MIXED) -> None:
    for i, mode in enumerate(modes):
        got, want = call(traced, mode, args, i), call(eager, mode, args, i)
        assert len(got) == len(want)
        for j, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"call {i}, {mode}, output {j}")
        assert_same_state(traced, eager, f"after call {i}, {mode}")


def assert_same_training(
    traced: nn.Module, eager: nn.Module, args: tuple[Any, ...], make: Optimizer, steps: int
) -> None:
    models = (traced, eager)
    optimizers = [make([p for p in model.parameters() if p.requires_grad]) for model in models]
    for step in range(steps):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            outputs = [o for o in call(model, "train", args, step) if isinstance(o, Tensor) and o.requires_grad]
            loss = torch.stack([(o.double() ** 2).mean() for o in outputs]).sum()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss)
        assert_same(*losses, f"loss {step}")
        gradients = zip(traced.parameters(), eager.named_parameters(), strict=True)
        for got, (name, want) in gradients:
            assert (got.grad is None) == (want.grad is None), name
            if want.grad is not None:
                assert_same(got.grad, want.grad, f"gradient {step} of {name}")
        for optimizer in optimizers:
            optimizer.step()
        assert_same_state(traced, eager, f"after step {step}")


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


@functools.lru_cache(maxsize=2)  # the tests take one layer after the other
def _captured(plain: Callable[[], nn.Module], args: tuple[Any, ...], dynamic_shapes: str | None) -> TracedModule:
    """One capture of what `plain` builds; what a test inserts goes into a copy."""
    return fxprune.trace(plain(), args, dynamic_shapes=dynamic_shapes)


def assert_follows_eager(
    plain: Callable[[], nn.Module],
    touch: Callable[[nn.Module], Any],
    args: tuple[Any, ...],
    insert: Callable[[TracedModule], Any] | None = None,
    *,
    tied: bool = False,
    dynamic_shapes: str | None = None,
) -> None:
    """The whole contract on one model.

    `touch` reparametrizes the eager model; without `insert` that is what is traced, with it the plain model is traced
    and `insert` does to it what `touch` does to the eager one. `tied`: the two sides part, so both parameters are
    listed. `dynamic_shapes` is `trace`'s: a fixed batch is captured in half of the time.
    """

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = plain()
        torch.manual_seed(seed + 1)
        touch(model)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on legacy norms and on recurrent weights
        eager = make(0)
        after = generators()
        if insert is None:
            source = make(0)
            traced = fxprune.trace(source, args, dynamic_shapes=dynamic_shapes)
            assert all(a is b for a, b in zip(traced.parameters(), source.parameters(), strict=True))
        else:
            traced = copy.deepcopy(_captured(plain, args, dynamic_shapes))
            torch.manual_seed(0)
            traced.load_state_dict(plain().state_dict())
            torch.manual_seed(1)
            insert(traced.train())
        assert generators() == after, "a random generator moved otherwise than in eager"
        assert not any(module._forward_pre_hooks for module in traced.modules())
        assert_same_state(traced, eager, "start")
        assert_same_calls(traced, eager, args)
        assert_same_training(traced, eager, args, sgd, 3)
        assert_same_training(traced, eager, args, adam, 2)
        assert_same_calls(traced, eager, args, ("eval", "train", "eval"))

        other = make(7)
        call(other, "train", args)
        traced.load_state_dict(other.state_dict())
        assert_same_calls(traced, other, args, ("eval", "train"))
        eager.load_state_dict(traced.state_dict())
        assert_same_calls(traced, eager, args, ("eval", "train", "eval"))

        before, state = generators(), {name: value.clone() for name, value in traced.state_dict().items()}
        final = fxprune.finalize(traced, shrink=False)
        assert generators() == before
        for name, value in traced.state_dict().items():
            assert_same(value, state[name], f"finalize changed {name} of its argument")
        untouched = plain()
        assert list(final.state_dict()) == list(untouched.state_dict())
        if not tied:
            assert [n for n, _ in final.named_parameters()] == [n for n, _ in untouched.named_parameters()]
        untouched.load_state_dict(final.state_dict())
        again = fxprune.finalize(final, shrink=False)
        # some kernels round otherwise in another memory format, and torch's weight norm gives a contiguous weight
        pairs = zip(final.parameters(), untouched.parameters(), strict=True)
        alike = not tied and all(a.stride() == b.stride() for a, b in pairs)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                want = call(traced, "eval", args)
                candidates = [final, again, *([untouched] if gradients and alike else [])]
                for candidate in candidates:
                    for got, value in zip(call(candidate, "eval", args), want, strict=True):
                        assert_same(got, value, f"finalized, gradients {gradients}")


# ---- layers: the model, its input, the reparametrized module and parameter


class SelfAttention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, **{"batch_first": True, **kwargs})

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Parallel(nn.Module):
    """Layers beside each other, each of which may be under another system; it returns what each gives."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 8, dtype=dtype) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = (_randn(3, 6),)
IDS = (torch.tensor([[1, 2, 0, 8], [3, 3, 5, 7], [4, 6, 8, 0]]),)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {
    "linear": (mlp, X, "0.weight"),
    "bias": (mlp, X, "0.bias"),
    "root": (lambda: nn.Linear(6, 8), X, "weight"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (_randn(3, 3, 6),), "0.weight"),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        (_randn(3, 4, 6, 6),),
        "0.weight",
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (_randn(3, 2, 4, 4, 4),), "weight"),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (_randn(3, 3, 6),), "weight"),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (_randn(3, 3, 4, 4),), "weight"),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (_randn(3, 2, 3, 3, 3),), "weight"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), IDS, "0.weight"),
    "bag": (lambda: nn.EmbeddingBag(9, 4), IDS, "weight"),
    "bilinear": (lambda: nn.Bilinear(4, 5, 3), (_randn(3, 4), _randn(3, 5)), "weight"),
    "lstm": (lambda: nn.LSTM(4, 6, num_layers=2, batch_first=True), (_randn(3, 5, 4),), "weight_hh_l0"),
    "lstm projection": (lambda: nn.LSTM(4, 6, proj_size=3, batch_first=True), (_randn(3, 5, 4),), "weight_hr_l0"),
    "gru": (lambda: nn.GRU(4, 6, batch_first=True, bidirectional=True), (_randn(3, 5, 4),), "weight_ih_l0_reverse"),
    "rnn": (lambda: nn.RNN(4, 6), (_randn(5, 3, 4), _randn(1, 3, 6)), "weight_ih_l0"),
    "attention": (SelfAttention, (_randn(3, 5, 8),), "attention.in_proj_weight"),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (_randn(3, 5, 8),),
        "linear1.weight",
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), X, "1.weight"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), X, "1.weight"),
}


# ---- torch's systems: the eager spelling and, where there is one, fxprune's

Eager = Callable[[nn.Module, str], Any]
Traced = Callable[[TracedModule, str], Any]


class EveryThird(torch_prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::3] = 0
        return mask


class CoinToss(torch_prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask * (torch.rand_like(t) > 0.5)


def _three(spelling: Any, model: nn.Module, name: str) -> None:
    spelling.l1_unstructured(model, name, 0.4)
    spelling.random_structured(model, name, 1, 0)
    spelling.random_unstructured(model, name, 0.3)


MASKS: dict[str, tuple[Eager, Traced]] = {
    "identity": (torch_prune.identity, prune.identity),
    "l1": (lambda m, n: torch_prune.l1_unstructured(m, n, 0.4), lambda t, n: prune.l1_unstructured(t, n, 0.4)),
    "l1 with scores": (
        lambda m, n: torch_prune.l1_unstructured(m, n, 0.4, torch.rand(getattr(m, n).shape)),
        lambda t, n: prune.l1_unstructured(t, n, 0.4, torch.rand(t.get_parameter(n).shape)),
    ),
    "random": (lambda m, n: torch_prune.random_unstructured(m, n, 2), lambda t, n: prune.random_unstructured(t, n, 2)),
    "random structured": (
        lambda m, n: torch_prune.random_structured(m, n, 0.5, -1),
        lambda t, n: prune.random_structured(t, n, 0.5, -1),
    ),
    "ln structured": (
        lambda m, n: torch_prune.ln_structured(m, n, 0.5, 2, 0),
        lambda t, n: prune.ln_structured(t, n, 0.5, 2, 0),
    ),
    "bool mask": (
        lambda m, n: torch_prune.custom_from_mask(m, n, torch.rand(getattr(m, n).shape) > 0.5),
        lambda t, n: prune.custom_from_mask(t, n, torch.rand(t.get_parameter(n).shape) > 0.5),
    ),
    "int mask": (
        lambda m, n: torch_prune.custom_from_mask(m, n, torch.randint(0, 2, getattr(m, n).shape)),
        lambda t, n: prune.custom_from_mask(t, n, torch.randint(0, 2, t.get_parameter(n).shape)),
    ),
    "scaling mask": (
        lambda m, n: torch_prune.custom_from_mask(m, n, torch.rand(getattr(m, n).shape) * 2),
        lambda t, n: prune.custom_from_mask(t, n, torch.rand(t.get_parameter(n).shape) * 2),
    ),
    "own method": (EveryThird.apply, lambda t, n: prune.apply(t, n, EveryThird())),
    "own random method": (CoinToss.apply, lambda t, n: prune.apply(t, n, CoinToss())),
    "container of three": (lambda m, n: _three(torch_prune, m, n), lambda t, n: _three(prune, t, n)),
}
NORMS: dict[str, tuple[Eager, Traced]] = {
    "weight norm": (parametrizations.weight_norm, fxprune.weight_norm),
    "weight norm, dim 1": (
        lambda m, n: parametrizations.weight_norm(m, n, 1),
        lambda t, n: fxprune.weight_norm(t, n, 1),
    ),
    "weight norm, dim -1": (
        lambda m, n: parametrizations.weight_norm(m, n, -1),
        lambda t, n: fxprune.weight_norm(t, n, -1),
    ),
    "weight norm, dim -2": (
        lambda m, n: parametrizations.weight_norm(m, n, -2),
        lambda t, n: fxprune.weight_norm(t, n, -2),
    ),
    "weight norm, dim None": (
        lambda m, n: parametrizations.weight_norm(m, n, None),  # type: ignore[arg-type]
        lambda t, n: fxprune.weight_norm(t, n, None),
    ),
    "spectral norm": (parametrizations.spectral_norm, fxprune.spectral_norm),
    "spectral norm, options": (
        lambda m, n: parametrizations.spectral_norm(m, n, 3, 1e-6, -1),
        lambda t, n: fxprune.spectral_norm(t, n, 3, 1e-6, -1),
    ),
}
CARRIED_ONLY: dict[str, Eager] = {
    "legacy weight norm": weight_norm,
    "legacy weight norm, dim 1": lambda m, n: weight_norm(m, n, 1),
    "legacy weight norm, dim None": lambda m, n: weight_norm(m, n, None),  # type: ignore[arg-type]
    "legacy spectral norm": spectral_norm,
    "legacy spectral norm, options": lambda m, n: spectral_norm(m, n, 3, 1e-6, 1),
    "orthogonal": parametrizations.orthogonal,
    "orthogonal, cayley": lambda m, n: parametrizations.orthogonal(m, n, "cayley"),
    "orthogonal, householder": lambda m, n: parametrizations.orthogonal(m, n, "householder", use_trivialization=False),
}


FREE = ("linear", "conv2d")  # the layers that are captured for any batch
# the layers that every system is tried on each time; the others are under `EVERYWHERE` alone, save with the slow tests
QUICK_LAYERS = ("linear", "bias", "conv2d")
EVERYWHERE = "spectral norm"  # which must know a layer's dimension of outputs


def rows(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Pairs of layer and system, those marked slow that show little that the others do not."""
    return [
        pair if pair[0] in QUICK_LAYERS or pair[1] == EVERYWHERE else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in pairs
    ]
