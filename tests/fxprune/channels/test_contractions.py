"""Every spelling of a product of matrices is one contraction, and loses the same channels."""

from __future__ import annotations

import string
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.channels.rules.labels import Equation, Labels
from tests.fxprune.channels.exactness import error

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

# x [batch, 6], weight [4, 6], bias [4]
MATRICES: dict[str, Product] = {
    "linear": lambda x, weight, bias: nn.functional.linear(x, weight, bias),
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight.t()),
    "mm": lambda x, weight, bias: torch.mm(x, weight.t()) + bias,
    "matmul": lambda x, weight, bias: x @ weight.t() + bias,
    "bmm": lambda x, weight, bias: torch.bmm(x[None], weight.t()[None])[0] + bias,
    "baddbmm": lambda x, weight, bias: torch.baddbmm(bias.view(1, 1, 4), x[None], weight.t()[None])[0],
    "einsum": lambda x, weight, bias: torch.einsum("bi,oi->bo", x, weight) + bias,
    "einsum with the weight turned": lambda x, weight, bias: torch.einsum("bi,io->bo", x, weight.t()) + bias,
}


class Between(nn.Module):
    """A product between two linear layers."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(4, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self.first(x), self.weight, self.bias).relu())


def assert_equal(model: nn.Module, final: fxprune.TracedModule, x: Tensor) -> None:
    with torch.no_grad():
        assert error(model(x), final(x)) < 1e-9


@pytest.mark.parametrize("spelling", MATRICES)
def test_dead_inputs_and_outputs_of_a_product_go(spelling: str) -> None:
    model = Between(MATRICES[spelling]).double().eval()
    with torch.no_grad():
        model.first.weight[:2] = 0
        model.first.bias[:2] = 0
        model.weight[1] = 0
        model.bias[1] = 0
    traced = fxprune.trace(model, (torch.randn(2, 5).double(),), modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert len(final.plan.kept["first.weight"][0]) == 4
    assert final.plan.kept["last.weight"][1].tolist() == [0, 2, 3]
    for batch in (1, 2, 5):
        assert_equal(model, final, torch.randn(batch, 5).double())


@pytest.mark.parametrize("spelling", ["linear", "addmm", "mm", "matmul", "einsum"])
def test_constants_behind_dead_rows_fold(spelling: str) -> None:
    model = Between(MATRICES[spelling]).double().eval()
    with torch.no_grad():
        model.first.weight[:2] = 0  # their biases stay: constants
    traced = fxprune.trace(model, (torch.randn(2, 5).double(),), modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert len(final.plan.kept["first.weight"][0]) == 4
    assert_equal(model, final, torch.randn(3, 5).double())


def test_a_scaled_product_keeps_its_scale() -> None:
    scaled = Between(lambda x, weight, bias: torch.addmm(bias, x, weight.t(), beta=0.5, alpha=2.0)).double().eval()
    with torch.no_grad():
        scaled.first.weight[:2] = 0
    final = fxprune.finalize(fxprune.trace(scaled, (torch.randn(2, 5).double(),), modes=("eval",)), align=1)
    assert_equal(scaled, final, torch.randn(3, 5).double())


def test_weights_that_sum_to_one_are_those_of_the_axis_that_is_contracted() -> None:
    class Turned(nn.Module):
        """Attention over queries instead of keys: a constant value channel does not pass it."""

        def __init__(self) -> None:
            super().__init__()
            self.scores, self.values, self.out = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.scores(x).softmax(-1)  # [batch, keys, queries]
            return self.out(torch.einsum("bkq,bkd->bqd", weights, self.values(x)))

    model = Turned().double().eval()
    with torch.no_grad():
        model.values.weight[:3] = 0
    traced = fxprune.trace(model, (torch.randn(2, 7, 5).double(),), modes=("eval",))
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert len(final.plan.kept["values.weight"][0]) == 6
    assert_equal(model, final, torch.randn(3, 7, 5).double())


@pytest.mark.parametrize(
    ("ranks", "transposed", "labels"),
    [
        ((2, 2), False, ("MK", "KN", "MN")),
        ((2, 2), True, ("MK", "NK", "MN")),
        ((4, 2), True, ("abMK", "NK", "abMN")),
        ((3, 4), False, ("bMK", "abKN", "abMN")),
        ((1, 2), False, ("K", "KN", "N")),
        ((3, 1), False, ("aMK", "K", "aM")),
        ((1, 1), False, ("K", "K", "")),
    ],
)
def test_products_are_labelled_as_torch_broadcasts_them(
    ranks: tuple[int, int], transposed: bool, labels: tuple[str, str, str]
) -> None:
    found = Labels.of_matmul(*ranks, transposed)
    assert (found.left, found.right, found.out) == labels


def test_an_equation_is_understood_in_any_order() -> None:
    found = Equation.parse("bhqd, bhkd -> bhqk", [4, 4])
    assert found is not None
    (labels,) = found.in_pairs()
    assert (labels.batch, labels.outer, labels.inner, labels.contracted) == ("bh", "q", "k", "d")


@pytest.mark.parametrize(
    ("equation", "ranks", "operands", "out"),
    [
        ("...i,ij->...j", (4, 2), ("012i", "ij"), "012j"),
        ("...i,...ij", (2, 4), ("1i", "01ij"), "01j"),
        ("...->", (2,), ("01",), ""),
        ("cba", (3,), ("cba",), "abc"),
        ("ij,jk,kl->il", (2, 2, 2), ("ij", "jk", "kl"), "il"),
    ],
)
def test_an_equation_is_written_out_as_torch_reads_it(
    equation: str, ranks: tuple[int, ...], operands: tuple[str, ...], out: str
) -> None:
    found = Equation.parse(equation, ranks)
    assert found == Equation(operands, out)
    sizes = dict(zip(string.ascii_lowercase + string.digits, range(2, 38), strict=True))
    tensors = [torch.randn([sizes[c] for c in own]) for own in operands]
    assert torch.einsum(equation, *tensors).shape == tuple(sizes[c] for c in out)


@pytest.mark.parametrize(
    "equation", ["bi,bi,ij,jo->bo", "bi,ij,jo->bo", "...i,...i,ij,jo->...o", "bi,bj,ij,jo->bo", "jo,bi,ij->bo"]
)
def test_equations_of_several_operands_cost_what_torch_counts(equation: str) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 16), nn.Linear(6, 16 if "bj" not in equation else 12)
            self.first, self.second = nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(12, 10))
            self.out = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            named = iter((self.left(x).relu(), self.right(x).relu()))
            operands = [
                {"ij": self.first, "jo": self.second}[term] if term in ("ij", "jo") else next(named)
                for term in equation.partition("->")[0].split(",")
            ]
            return self.out(torch.einsum(equation, *operands))

    torch.manual_seed(0)
    model, x = Several().double().eval(), torch.randn(4, 6).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    report = fxprune.prune.channels(traced, macs=0.5, round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.macs == report.macs
    assert_equal(traced, final, torch.randn(3, 6).double())


def test_a_diagonal_is_not_understood() -> None:
    assert Equation.parse("ii,ij->j", [2, 2]) is None


class Delta(nn.Module):
    """Heads whose values solve a system of their keys, as layers with a gated delta rule have them."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.left = left
        self.keys, self.values, self.out = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in (self.keys(x), self.values(x)))
        system, solve = keys @ keys.mT, torch.linalg.solve_triangular
        if self.left:
            found = solve(system, values, upper=False, unitriangular=True)
        else:
            found = solve(system, values.mT, upper=True, left=False, unitriangular=True).mT
        return self.out(found.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("left", [True, False])
def test_heads_and_channels_of_triangular_systems_go_and_a_matrix_of_zeros_passes_all_on(left: bool) -> None:
    model, x = Delta(left).double().eval(), torch.randn(2, 7, 12).double()
    traced = fxprune.trace(model, x, modes=("eval",))
    fxprune.prune.channels(traced, 0.5, round_to=1)
    final = fxprune.finalize(traced, align=1)
    assert final.plan is not None
    assert final.plan.macs[1] <= 0.4 * final.plan.macs[0]
    for given in (x, torch.randn(3, 7, 12).double()):
        assert_equal(traced, final, given)
    for name, left_over in (("values", 18), ("keys", 24)):
        traced = fxprune.trace(model, x, modes=("eval",))
        for parameter in (f"{name}.weight", f"{name}.bias"):
            mask = torch.ones_like(model.get_parameter(parameter))
            mask[:6] = 0  # the first head's
            fxprune.prune.custom_from_mask(traced, parameter, mask)
        final = fxprune.finalize(traced, align=1)
        assert_equal(traced, final, x)
        assert len(final.get_parameter("values.weight")) == left_over
