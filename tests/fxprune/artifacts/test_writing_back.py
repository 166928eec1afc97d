"""The way back to the user's own class: same class and keys, smaller, equal to the masked model at every batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fxprune
from fxprune.artifacts.writing_back import write_back
from fxprune.errors import ArgumentTypeError, FxpruneError, WriteBackError
from tests.architectures import ARCHITECTURES, FAMILIES, prepare, transformer
from tests.fxprune.channels.exactness import error
from tests.fxprune.channels.test_zoo import repeated
from tests.networks import NETWORKS


class Blocks(nn.Module):
    """A depthwise layer, a shuffle of channels by their number, a gate, and a number of features kept aside."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.groups, self.features = 16, 2, (16, 8)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.gate = nn.Linear(16, 16)
        self.inner = nn.Conv2d(16, 8, 1, groups=2)
        self.out = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(x)
        x = x * self.gate(x.mean((2, 3))).sigmoid().view(-1, self.width, 1, 1)
        x = x.view(-1, self.groups, self.width // self.groups, 4, 4).transpose(1, 2).flatten(1, 2)
        x = self.inner(x).relu()
        return self.out(x.reshape(-1, self.features[1] * 16))


class Attention(nn.Module):
    """Multi-head attention that takes the number of heads and their sizes from its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.all_head_size = 4, 4, 16
        self.query, self.key, self.value = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16)
        self.out = nn.Linear(16, 12)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        y = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.all_head_size))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.out = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu().view(-1, 128))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.second.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu()) + self.again(x)


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 4, 4, dtype=torch.float64)


def agree(traced: nn.Module, small: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The written module computes what the masked one does, at three batch sizes."""
    for batch in (1, 2, 3):
        again, named = repeated(args, batch), repeated(kwargs, batch)
        with torch.no_grad():
            want, got = traced(*again, **named), small(*again, **named)
        pair = [[t for t in pytree.tree_leaves(side) if isinstance(t, Tensor)] for side in (want, got)]
        assert error(*pair) < 1e-9


def masked(model: nn.Module, inputs: Any, *names: str, amount: float = 0.5, **options: Any) -> fxprune.TracedModule:
    traced = fxprune.trace(model, inputs, **options).eval()
    for name in names:
        fxprune.prune.ln_structured(traced, name, amount=amount, n=2, dim=0)
    return traced


def mask_rows(traced: fxprune.TracedModule, rows: Any, *names: str) -> None:
    for name in names:
        mask = torch.ones_like(traced.get_parameter(name))
        mask[rows] = 0
        fxprune.prune.custom_from_mask(traced, name, mask)


def test_layers_and_attributes_follow_and_the_given_model_stays() -> None:
    model = Blocks().double().eval()
    before, state = copy.deepcopy(vars(model)), {k: v.clone() for k, v in model.state_dict().items()}
    traced = masked(model, (image(),))
    mask_rows(traced, [1, 5, 9, 13], "stem.weight", "stem.bias", "norm.weight", "norm.bias", "depthwise.weight")
    mask_rows(traced, [2, 6], "inner.weight", "inner.bias")
    final = fxprune.finalize(traced, align=1)
    small = write_back(final, model)
    agree(traced, small, image())
    assert type(small) is Blocks
    assert small.state_dict().keys() == model.state_dict().keys()
    assert (small.stem.out_channels, small.norm.num_features, small.depthwise.groups) == (12, 12, 12)
    assert (small.inner.in_channels, small.inner.out_channels, small.inner.groups) == (12, 6, 2)
    assert (small.width, small.groups, small.features[1], small.out.in_features) == (12, 2, 6, 96)
    assert {k: v for k, v in vars(model).items() if type(v) is int} == {
        k: v for k, v in before.items() if type(v) is int
    }
    assert model.features == (16, 8)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    for p, q in zip(small.parameters(), final.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()


@pytest.mark.filterwarnings("ignore::fxprune.errors.EvalConstantWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "encoder" else name for name in NETWORKS]
)
def test_mode_flags_and_train_behaviour_are_kept(name: str) -> None:
    build, inputs, names = NETWORKS[name]
    model = build()
    next(model.parameters()).requires_grad_(False)
    next(m for m in model.modules() if m is not model).eval()
    traced = fxprune.trace(model, (inputs(4),))
    fxprune.prune.ln_structured(traced, names[0], amount=0.5, n=2, dim=0)
    final = fxprune.finalize(traced.eval(), align=1)
    small = write_back(final, model)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.requires_grad == flags.get(n, True) for n, p in small.named_parameters())
    x = inputs(3)
    with torch.no_grad():
        assert error(traced.eval()(x), copy.deepcopy(small).eval()(x)) < 1e-5
    small.train()(inputs(4)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_go_and_their_number_follows_even_where_rounding_hides_it(dtype: torch.dtype) -> None:
    model = Attention().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1)  # all heads attend to everything alike, nearly
    x = torch.randn(2, 5, 12, dtype=dtype)
    traced = masked(model, (x,), modes=("eval",))
    for layer in ("query", "key", "value"):
        mask_rows(traced, slice(4, 8), f"{layer}.weight", f"{layer}.bias")
    small = write_back(fxprune.finalize(traced, align=1), model)
    assert all(p.dtype == dtype for p in small.parameters())
    agree(traced.double(), small.double(), x.double())
    assert (small.num_heads, small.head_dim, small.all_head_size, small.out.in_features) == (3, 4, 12, 12)


def test_a_class_with_one_size_for_all_heads_gets_zeros_where_only_some_can_shrink() -> None:
    model = Attention().double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    traced = masked(model, (x,), modes=("eval",))
    mask_rows(traced, [0, 4, 8, 12], "value.weight", "value.bias")
    for layer in ("query", "key"):
        mask_rows(traced, [0, 1, 4, 5, 8, 9, 12, 13], f"{layer}.weight", f"{layer}.bias")
    final = fxprune.finalize(traced, align=1)
    assert (len(final.query.weight), len(final.value.weight)) == (8, 12)
    small = write_back(final, model)
    agree(traced, small, x)
    assert (small.num_heads, small.head_dim, len(small.query.weight)) == (4, 3, 12)
    assert int((small.query.weight == 0).all(1).sum()) == 4


class ConvolvedAttention(Attention):
    """Its projections are convolutions, which read integers of their own that are ratios of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv1d(12, 16, 5, padding=2) for _ in range(3))
        self.out = nn.Conv1d(16, 12, 5, padding=2)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.num_heads, self.head_dim, x.shape[2]).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        y = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return x + self.out(y.transpose(2, 3).reshape(x.shape[0], self.num_heads * self.head_dim, x.shape[2]))


def test_layers_that_get_zeros_back_have_attributes_of_that_size() -> None:
    model, x = ConvolvedAttention().double().eval(), torch.randn(2, 12, 5, dtype=torch.float64)
    traced = masked(model, (x,), modes=("eval",))
    mask_rows(traced, [0, 4, 8, 12], "value.weight", "value.bias")
    for layer in ("query", "key"):
        mask_rows(traced, [0, 1, 4, 5, 8, 9, 12, 13], f"{layer}.weight", f"{layer}.bias")
    small = write_back(fxprune.finalize(traced, align=1), model)
    agree(traced, small, x)
    for layer in small.children():
        assert (layer.out_channels, layer.in_channels) == layer.weight.shape[:2] == (12, 12)


class Limited(nn.Module):
    """Runs out of memory with any size but the model's."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.first, self.last, self.width, self.error = nn.Linear(6, 8), nn.Linear(8, 2), 8, error

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[-1] != 8:
            raise self.error("no memory")
        return self.last(x.view(-1, self.width))


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_no_sign_of_a_wrong_size(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Limited(kind).double(), torch.randn(2, 6, dtype=torch.float64)
    traced = masked(model, (x,), modes=("eval",))
    mask_rows(traced, [1, 2], "first.weight", "first.bias")
    final = fxprune.finalize(traced, align=1)
    calls: list[int] = []
    forward = Limited.forward
    monkeypatch.setattr(Limited, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    with pytest.raises(WriteBackError, match=f"{kind.__name__}: no memory"):
        write_back(final, model)
    assert len(calls) == 2  # the model as it is, and once with the new sizes


def test_forwards_are_put_back_those_of_instances_too() -> None:
    model = Attention().double().eval()
    model.out.forward = forward = lambda x: nn.functional.linear(x, model.out.weight, model.out.bias)  # type: ignore[method-assign]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    small = write_back(fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",))), model)
    assert small.out.forward is forward
    assert not any("forward" in vars(module) for module in small.modules() if module is not small.out)


def test_a_size_in_the_code_is_refused_by_module_class_and_line() -> None:
    model = nn.Sequential(Fixed()).double()
    traced = masked(model, (image(),), modes=("eval",))
    mask_rows(traced, [1, 2], "0.conv.weight", "0.conv.bias")
    line = Fixed.forward.__code__.co_firstlineno + 1
    with pytest.raises(WriteBackError, match=rf"fails in 0 \(Fixed\), {__file__}:{line}: RuntimeError: shape .*128"):
        write_back(fxprune.finalize(traced, align=1), model)


class Halves(nn.Module):
    """Two halves of what a layer writes; the second goes through another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.append(self.middle(parts[-1]))
        return self.last(torch.cat(parts, 1))


@pytest.mark.parametrize(("rows", "left"), [([1, 2], 8), ([5, 6], 8), ([0, 1, 5, 6], 4)])
def test_halves_that_lost_unequally_many_channels_are_made_equal(rows: list[int], left: int) -> None:
    model = Halves().double()
    traced = masked(model, (image(),), modes=("eval",))
    mask_rows(traced, rows, "first.weight", "first.bias")
    final = fxprune.finalize(traced, align=1)
    small = write_back(final, model)
    assert len(small.first.weight) == left
    x = image()
    with torch.no_grad():
        assert torch.allclose(small.eval()(x), final(x))


@pytest.mark.parametrize("layers", [1, 2])
def test_heads_of_an_encoder_that_has_a_fused_path_come_back_as_zeros(layers: int) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), layers)
    model = encoder.double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            attention, size = layer.self_attn, 4
            for start in range(number * size, 48, 16):  # another head in each layer
                attention.in_proj_weight[start : start + size] = 0
                attention.in_proj_bias[start : start + size] = 0
            attention.out_proj.weight[:, number * size : (number + 1) * size] = 0
    final = fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",)), align=1)
    assert len(final.get_parameter("layers.0.self_attn.in_proj_weight")) == 36
    small = write_back(final, model)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x))


def test_a_class_that_computes_something_else_is_refused() -> None:
    model = Attention().double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    final = fxprune.finalize(fxprune.trace(model, (x,), modes=("eval",)))
    other = copy.deepcopy(model)
    other.forward = lambda x: x + other.out(other.value(x))  # type: ignore[method-assign]
    with pytest.raises(WriteBackError, match=r"an output differs"):
        write_back(final, other)


def test_folded_constants_come_as_a_bias() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    traced = masked(model, (x,), "0.weight", modes=("eval",))
    small = write_back(fxprune.finalize(traced, align=1), model)
    agree(traced, small, x)
    assert small.state_dict().keys() - model.state_dict().keys() == {"2.bias"}
    assert isinstance(small[2].bias, nn.Parameter)


def carry_prune(model: nn.Module) -> None:
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(model[0], "bias", 0.5)
    model(torch.randn(2, 6, dtype=torch.float64))


def carry_norms(model: nn.Module) -> None:
    nn.utils.weight_norm(model[0])
    parametrizations.weight_norm(model[2])
    parametrizations.spectral_norm(model[4])


def carry_both(model: nn.Module) -> None:
    parametrizations.weight_norm(model[2])
    prune.ln_structured(model[2].parametrizations.weight, "original0", 0.5, n=2, dim=0)
    nn.utils.spectral_norm(model[4])
    model(torch.randn(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("carry", [carry_prune, carry_norms, carry_both])
@pytest.mark.parametrize("training", [True, False])
def test_what_the_model_carries_is_folded_and_stays_on_the_model(
    carry: Callable[[nn.Module], None], training: bool
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    plain = list(model.state_dict())
    carry(model)
    model.train(training)
    x = torch.randn(2, 6, dtype=torch.float64)
    traced = masked(model, (x,), modes=("eval",))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    small = write_back(fxprune.finalize(traced, align=1), model)
    assert list(small.state_dict()) == plain
    assert [type(m) for m in small] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    agree(traced, small.eval(), x)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), traced(x))


def test_shared_parameters_and_modules_stay_shared() -> None:
    model = Tied().double()
    x = torch.randn(2, 6, dtype=torch.float64)
    traced = masked(model, (x,), modes=("eval",))
    mask_rows(traced, [0, 5], "first.weight", "first.bias")
    small = write_back(fxprune.finalize(traced, align=1), model)
    agree(traced, small, x)
    assert small.last.weight is small.second.weight
    assert small.again is small.first


def test_values_alone_are_written_back_without_a_plan() -> None:
    model = Blocks().double()
    traced = masked(model, (image(),), "stem.weight", modes=("eval",))
    small = write_back(fxprune.finalize(traced, shrink=False), model)
    agree(traced, small.eval(), image())
    assert int((small.stem.weight == 0).flatten(1).all(1).sum()) == 8
    assert int((model.stem.weight == 0).sum()) == 0


def test_folded_batch_norms_become_the_identity() -> None:
    model = Blocks().double().eval()
    model.norm.running_var.uniform_(0.5, 1.5)
    traced = masked(model, (image(),), modes=("eval",))
    mask_rows(traced, [1, 5, 9, 13], "stem.weight", "stem.bias", "norm.weight", "norm.bias", "depthwise.weight")
    small = write_back(fxprune.finalize(traced, align=1, fold_batch_norm=True), model)
    agree(traced, small, image())
    assert len(small.norm.weight) == 12


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.branch = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(x + self.branch(x))


def test_a_layer_that_left_the_graph_is_still_called_and_adds_nothing() -> None:
    model = Branch().double().eval()
    traced = masked(model, (image(),), modes=("eval",))
    mask_rows(traced, slice(0, 6), "branch.2.weight")
    mask_rows(traced, [4], "stem.weight", "stem.bias")
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert "branch.0.weight" in final.plan.dropped
    small = write_back(final, model)
    agree(traced, small, image())
    assert small.state_dict().keys() == model.state_dict().keys()
    assert small.branch[0].in_channels == small.branch[2].out_channels == 5


class CountingShuffle(nn.Module):
    """Counts its calls, and shuffles channels by torch's own operator, which has groups and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 8, 1, groups=2)
        self.shuffle = nn.ChannelShuffle(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.shuffle(self.first(x).relu())) * self.calls


def test_a_model_that_writes_into_its_buffers_comes_back_with_what_they_hold() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4)
    traced = fxprune.trace(CountingShuffle().eval(), x)
    fxprune.prune.channels(traced, amount=0.5, round_to=1)
    traced(x)
    final = fxprune.finalize(traced, align=1)
    written = write_back(final, CountingShuffle().eval())
    assert written.get_buffer("calls") == final.get_buffer("calls") == 1
    assert written.get_parameter("first.weight").shape[0] == 6
    for _ in range(2):
        torch.testing.assert_close(written(x), traced(x))


def test_wrong_arguments_are_refused() -> None:
    model = Blocks().double()
    traced = masked(model, (image(),), "stem.weight", modes=("eval",))
    final = fxprune.finalize(traced)
    with pytest.raises(ArgumentTypeError, match=r"Blocks and a Blocks"):
        write_back(model, model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"TracedModule and a TracedModule"):
        write_back(final, final)
    with pytest.raises(WriteBackError, match=r"stem.weight.*finalize"):
        write_back(traced, model)
    with pytest.raises(WriteBackError, match=r"shape"):
        write_back(fxprune.finalize(fxprune.trace(nn.Linear(2, 3), (torch.randn(2, 2),))), nn.Linear(2, 4))
    with pytest.raises(FxpruneError, match=r"weight"):
        write_back(final, nn.Linear(2, 3))


# ---- families

# (name, masks): why, where the class cannot hold the result
REFUSED = {
    ("dpn68", "half"): r"features.stage1.unit2.conv1 \(DPNConv\).*dpn.py:\d+",
    ("dpn68", "macs"): r"features.stage1.unit2.conv1 \(DPNConv\).*dpn.py:\d+",
    ("shufflenetv2_w1", "half"): r"features.stage1.unit2 \(ShuffleUnit\).*shufflenetv2.py:\d+",
    ("shufflenetv2_w1", "macs"): r"features.stage3.unit2 \(ShuffleUnit\).*shufflenetv2.py:\d+",
    ("shufflenetv2b_w1", "half"): r"features.stage1.unit2.conv1 \(ConvBlock\).*conv.py:\d+",
    ("shufflenetv2b_w1", "macs"): r"features.stage3.unit\d.conv1 \(ConvBlock\).*conv.py:\d+",
    ("dicenet_wd5", "half"): r"features.stage1.unit2.right_branch.conv \(ConvBlock\).*conv.py:\d+",
    ("cbam_resnet18", "half"): r"fc2 \(Linear\) has no place for 'folded_bias_1'",
    ("cbam_resnet18", "macs"): r"Statistics count channels that went.*stage2.unit1.cbam.sp_gate \(96 of 128\)",
    ("Albert", "half"): r"ffn_output \(Linear\) has no place for 'folded_bias_1'",
}


def family(name: str, transformers: Any, build: Callable[..., nn.Module]) -> tuple[nn.Module, Any, dict[str, Any]]:
    if name not in ARCHITECTURES:
        model = build(name)
        return model, (torch.randn(2, 3, *getattr(model, "in_size", (224, 224))).double(),), {}
    model, inputs = transformer(name, transformers)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model, (), inputs


QUICK = [
    ("GPT2", "half"), ("Llama", "macs"), ("ViT", "macs"),
]  # fmt: skip
UNPRUNABLE = (("dicenet_wd5", "macs"), ("condensenet74_c4_g4", "macs"))  # no group, or too few, may be pruned there
SWEEP = [(n, masks) for n in (*FAMILIES, *ARCHITECTURES) for masks in ("half", "macs") if (n, masks) not in UNPRUNABLE]
MORE = [("resnet20_cifar10", "macs"), ("Llama", "heads"), *SWEEP]
ALL = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in QUICK)]


@pytest.mark.parametrize(("name", "masks"), ALL)
@pytest.mark.filterwarnings("ignore")
def test_a_family_comes_back_in_its_own_class(
    name: str, masks: str, transformers: Any, pytorchcv_model: Callable[..., nn.Module]
) -> None:
    model, args, kwargs = family(name, transformers, pytorchcv_model)
    model = prepare(model) if masks == "half" else model.double().eval()
    traced = fxprune.trace(model, args, kwargs, modes=("eval",))
    if masks != "half":
        fxprune.prune.channels(traced, macs=0.6, kinds=("key-value group", "MLP unit") if masks == "heads" else None)
    final = fxprune.finalize(traced, align=1, keep_for_write_back=True)
    if (name, masks) in REFUSED:
        with pytest.raises(WriteBackError, match=REFUSED[name, masks]):
            write_back(final, model)
        return
    small = write_back(final, model)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    agree(traced, small, *args, **kwargs)
