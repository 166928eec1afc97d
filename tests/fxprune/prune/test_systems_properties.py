"""Random draws of layer, parameter, system and mode: the traced module is the eager one, to the bit."""

import functools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune

import fxprune
from fxprune import prune
from fxprune.graph.names import locate
from tests.systems import LAYERS, NORMS, assert_same, assert_same_calls, assert_same_state, generators

LAYER = st.sampled_from([name for name in LAYERS if name not in ("encoder layer", "rnn")])
AMOUNT = st.one_of(st.floats(0, 1), st.integers(0, 12))
METHOD = st.one_of(
    st.tuples(st.sampled_from(["l1_unstructured", "random_unstructured"]), st.tuples(AMOUNT)),
    st.tuples(st.just("random_structured"), st.tuples(AMOUNT, st.integers(-2, 1))),
    st.tuples(
        st.just("ln_structured"),
        st.tuples(AMOUNT, st.sampled_from([1, 2, 0.5, 0, -1, float("inf"), -float("inf")]), st.integers(-2, 1)),
    ),
    st.tuples(st.just("identity"), st.just(())),
)
MODES = st.lists(st.sampled_from(["train", "eval"]), min_size=1, max_size=3)
SEED = st.integers(0, 99)
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def _plain(layer):
    """One capture a layer; what is drawn happens to a copy."""
    torch.manual_seed(0)
    plain, args, _ = LAYERS[layer]
    model = plain()
    return fxprune.trace(model, args, dynamic_shapes=None), model.state_dict()


def _twins(layer):
    traced, state = _plain(layer)
    eager = LAYERS[layer][0]()
    eager.load_state_dict(state)
    clone = traced.__deepcopy__({})
    clone.load_state_dict(state)
    return eager, clone.train()


def assert_masks_agree(layer, methods, seed, modes):
    _, args, name = LAYERS[layer]
    eager, traced = _twins(layer)
    module, attribute = locate(eager, name)
    torch.manual_seed(seed)
    failed = None
    for method, arguments in methods:
        try:
            getattr(torch_prune, method)(module, attribute, *arguments)
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            failed = error
            break
    after = generators()
    torch.manual_seed(seed)
    kept = None
    try:
        for method, arguments in methods:
            kept = {n: v.clone() for n, v in traced.state_dict().items()}
            getattr(prune, method)(traced, name, *arguments)
    except fxprune.FxpruneError:
        assert failed is not None
        assert list(traced.state_dict()) == list(kept)
        for n, value in traced.state_dict().items():
            assert_same(value, kept[n], n)
        return
    assert failed is None, f"torch refuses: {failed}"
    assert generators() == after
    assert_same_state(traced, eager, "pruned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on recurrent weights in parts
        assert_same_calls(traced, eager, args, modes)


def assert_norms_agree(layer, system, seed, modes):
    _, args, name = LAYERS[layer]
    eager, traced = _twins(layer)
    in_eager, in_traced = NORMS[system]
    torch.manual_seed(seed)
    in_eager(*locate(eager, name))
    after = generators()
    torch.manual_seed(seed)
    in_traced(traced, name)
    assert generators() == after
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_calls(traced, eager, args, modes)
    final = fxprune.finalize(traced, shrink=False)
    assert list(final.state_dict()) == list(_plain(layer)[0].state_dict())


def assert_global_selection_agrees(names, method, amounts, seed):
    eager, traced = _twins("linear")
    torch.manual_seed(seed)
    for amount in amounts:
        torch_prune.global_unstructured([locate(eager, name) for name in names], method, amount=amount)
    after = generators()
    torch.manual_seed(seed)
    for amount in amounts:
        prune.global_unstructured(traced, iter(names), method, amount=amount)
    assert generators() == after
    assert_same_state(traced, eager, "pruned")


def hold(agree, draws, **drawn):
    """Run a check on so many draws of its arguments."""
    settings(SETTINGS, max_examples=draws)(given(**drawn)(agree))()


def few_or_many(few, many):
    return pytest.mark.parametrize("draws", [few, pytest.param(many, marks=pytest.mark.slow)])


@few_or_many(25, 300)
def test_masks_agree_with_torch_and_so_do_their_refusals(draws):
    methods = st.lists(METHOD, min_size=1, max_size=3)
    hold(assert_masks_agree, draws, layer=LAYER, methods=methods, seed=SEED, modes=MODES)


@few_or_many(8, 100)
def test_norms_agree_with_torch(draws):
    layer = LAYER.filter(lambda layer: layer not in ("bias", "layer norm", "batch norm"))
    hold(assert_norms_agree, draws, layer=layer, system=st.sampled_from(list(NORMS)), seed=SEED, modes=MODES)


@few_or_many(20, 200)
def test_global_selection_agrees_with_torch(draws):
    names = st.sampled_from(["0.weight", "0.bias", "2.weight", "2.bias"])
    hold(
        assert_global_selection_agrees,
        draws,
        names=st.lists(names, min_size=1, max_size=4, unique=True),
        method=st.sampled_from([torch_prune.L1Unstructured, torch_prune.RandomUnstructured]),
        amounts=st.lists(st.floats(0, 1), min_size=1, max_size=3),
        seed=SEED,
    )
