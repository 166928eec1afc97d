"""Each private part of torch still behaves as the library relies on: one test a name."""

from __future__ import annotations

import contextlib
import io

import pytest
import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export.pt2_archive import PT2ArchiveReader

from fxprune import torch_internals as internals
from tests.fxprune import (
    test_torch_internals_of_captures,
    test_torch_internals_of_modules,
    test_torch_internals_of_shards,
)

aten = torch.ops.aten


class Named(nn.Module):
    """Two arguments, one of them in a dictionary."""

    def forward(self, x: torch.Tensor, rest: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return x + rest["y"], x * rest["y"]


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Named(), (torch.ones(2), {"y": torch.ones(2)}), strict=False)


def test_every_name_has_a_test() -> None:
    others = test_torch_internals_of_captures, test_torch_internals_of_modules, test_torch_internals_of_shards
    files = globals(), *map(vars, others)
    tested = {name for names in files for name in names if name.startswith("test_")}
    missing = [name for name in internals.__all__ if not any(test.startswith(f"test_{name}") for test in tested)]
    assert missing == []


# ---- graphs


def test_OpOverload_is_the_class_of_operators() -> None:
    assert isinstance(aten.add.Tensor, internals.OpOverload)
    assert not isinstance(aten.add, internals.OpOverload)
    assert not isinstance(torch.add, internals.OpOverload)


def test_OpOverloadPacket_holds_all_overloads_of_a_name() -> None:
    assert isinstance(torch.ops.aten.add, internals.OpOverloadPacket)
    assert torch.ops.aten.add.Tensor.overloadpacket is torch.ops.aten.add


def test_functional_twin_is_the_same_overload_without_the_write() -> None:
    aten = torch.ops.aten
    assert internals.functional_twin(aten.add_.Tensor) is aten.add.Tensor
    assert internals.functional_twin(aten.bernoulli_.float) is aten.bernoulli  # which has no overload of this name
    assert internals.functional_twin(aten.add.Tensor) is None
    assert internals.functional_twin(aten.__and__.Tensor) is None


def test_overload_of_custom_operator_is_what_a_graph_calls() -> None:
    @torch.library.custom_op("fxprune_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    assert internals.overload_of_custom_operator(twice) is torch.ops.fxprune_tests.twice.default
    assert internals.overload_of_custom_operator(torch.ops.aten.add.Tensor) is torch.ops.aten.add.Tensor


def test_symbolic_square_root_takes_numbers_too() -> None:
    assert internals.symbolic_square_root(9) == 3.0


def test_schema_of_tells_names_writes_and_views() -> None:
    schema = internals.schema_of(aten.copy_.default)
    assert schema is not None
    assert schema.is_mutable
    assert [a.name for a in schema.arguments][:2] == ["self", "src"]
    writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    assert writes[:2] == [True, False]
    view = internals.schema_of(aten.view.default)
    assert view is not None
    assert not view.is_mutable
    assert view.returns[0].alias_info is not None
    plain = internals.schema_of(aten.add.Tensor)
    assert plain is not None
    assert plain.returns[0].alias_info is None
    assert internals.schema_of(torch.add) is internals.schema_of("x") is None


def test_PyTreeInfo_and_PyTreeCodeGen_give_a_graph_a_signature(program: torch.export.ExportedProgram) -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(torch.add, (x, y)), graph.call_function(torch.mul, (x, y))))
    spec = program.call_spec
    graph.set_codegen(internals.PyTreeCodeGen(internals.PyTreeInfo(["x", "rest"], spec.in_spec, spec.out_spec)))
    module = fx.GraphModule(nn.Module(), graph)
    found = module(torch.full((2,), 3.0), rest={"y": torch.full((2,), 2.0)})
    assert [value[0].item() for value in found] == [5.0, 6.0]


def test_PyTreeCodeGen_writes_a_read_as_one_path() -> None:
    """Targets are split at dots by the generator; parts that are no identifiers go through getattr."""
    graph = fx.Graph()
    graph.output(graph.get_attr("0.weight"))
    graph.set_codegen(
        internals.PyTreeCodeGen(internals.PyTreeInfo([], pytree.tree_structure(((), {})), pytree.tree_structure(0)))
    )
    layer = nn.Sequential(nn.Linear(2, 2))
    assert 'getattr(self, "0").weight' in fx.GraphModule(layer, graph).code


def test_pytree_info_is_what_the_graph_was_given(program: torch.export.ExportedProgram) -> None:
    graph = fx.Graph()
    info = internals.PyTreeInfo(["x", "rest"], program.call_spec.in_spec, program.call_spec.out_spec)
    graph.set_codegen(internals.PyTreeCodeGen(info))
    found = internals.pytree_info(graph)
    assert found.orig_args == ["x", "rest"]
    assert found.in_spec.child(0).num_children == 2
    assert found.in_spec.child(1).context == []
    assert found.out_spec == program.call_spec.out_spec


def test_is_composite_tells_dropout_which_gives_its_operand_back() -> None:
    dropout, x = torch.ops.aten.dropout.default, torch.zeros(2)
    assert dropout(x, 0.5, False).data_ptr() == x.data_ptr()
    assert internals.is_composite(dropout) and internals.is_composite(aten.to.dtype)  # noqa: PT018
    assert not internals.is_composite(aten.add.Tensor)


def test_is_erased_follows_erase_node() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.add, (1, 2))
    assert not internals.is_erased(node)
    graph.erase_node(node)
    assert internals.is_erased(node)


def test_state_of_generated_code_brings_a_module_back_to_another_graph() -> None:
    def returning(value: int) -> fx.Graph:
        graph = fx.Graph()
        graph.output(value)
        return graph

    module = fx.GraphModule(nn.Module(), returning(1))
    state, forward = internals.state_of_generated_code(module), type(module).forward
    code = module.code
    module.graph = returning(2)
    assert module() == 2
    assert module.code != code
    module.__dict__.update(state)
    type(module).forward = forward  # type: ignore[method-assign]
    assert module() == 1
    assert module.code == code
    assert module.graph is state["_graph"]


def test_FakeTensorMode_gives_tensors_without_values() -> None:
    with internals.FakeTensorMode():
        value = torch.empty(2, 3) @ torch.empty(3, 4)
    assert isinstance(value, internals.FakeTensor)
    assert value.shape == (2, 4)


def test_FakeTensor_is_what_captures_record(program: torch.export.ExportedProgram) -> None:
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    assert values
    assert all(isinstance(value, internals.FakeTensor) for value in values)
    assert values[0].fake_device == torch.device("cpu")


def test_fake_tensor_has_the_sizes_given_and_the_device_of_the_other() -> None:
    mode = internals.FakeTensorMode()
    like = mode.from_tensor(torch.ones(4))
    found = internals.fake_tensor(like, torch.empty_strided((2, 3), (1, 2), device="meta"))
    assert (found.shape, found.stride(), found.device) == ((2, 3), (1, 2), torch.device("cpu"))
    assert found.fake_mode is mode
    assert isinstance(found + found, internals.FakeTensor)


def test_programs_in_reads_what_export_saves(program: torch.export.ExportedProgram) -> None:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    reader = PT2ArchiveReader(file)
    again = internals.programs_in(reader, reader.get_file_names(), None)["model"]
    assert torch.equal(again.module()(torch.ones(2), {"y": torch.ones(2)})[0], torch.full((2,), 2.0))


# ---- exported programs


@pytest.fixture(scope="module")
def free_batch() -> torch.export.ExportedProgram:
    """A program with a free axis that may be 3 to 9."""
    shapes = {"input": {0: torch.export.Dim("batch", min=3, max=9)}}
    return torch.export.export(nn.Linear(2, 2), (torch.ones(4, 2),), dynamic_shapes=shapes, strict=False)


def test_TrainingIRVerifier_accepts_a_graph_as_it_is_captured(program: torch.export.ExportedProgram) -> None:
    internals.TrainingIRVerifier().check(program)
    assert internals.TrainingIRVerifier.dialect == "TRAINING"


def test_fake_cpu_tensor_has_no_values_and_everything_else() -> None:
    like = nn.Parameter(torch.ones(2, 3, dtype=torch.float64).t())
    fake = internals.fake_cpu_tensor(internals.FakeTensorMode(), like)
    assert isinstance(fake, internals.FakeTensor)
    assert (fake.shape, fake.stride(), fake.dtype) == (like.shape, like.stride(), like.dtype)
    assert fake.device.type == "cpu"
    assert fake.requires_grad


def test_fake_like_has_fixed_sizes_whatever_the_mode(free_batch: torch.export.ExportedProgram) -> None:
    (*_, value) = (node.meta["val"] for node in free_batch.graph.find_nodes(op="placeholder"))
    fake = internals.fake_like(value.fake_mode, torch.randn(3, 5).t())
    assert isinstance(fake, internals.FakeTensor)
    assert (tuple(fake.shape), fake.stride(), fake.fake_mode) == ((5, 3), (1, 5), value.fake_mode)


def test_guards_ignored_learns_nothing(free_batch: torch.export.ExportedProgram) -> None:
    (*_, value) = (node.meta["val"] for node in free_batch.graph.find_nodes(op="placeholder"))
    sizes = value.fake_mode.shape_env
    before = len(sizes.guards), dict(sizes.replacements)
    with internals.guards_ignored(value.fake_mode):
        assert bool(value.shape[0] < 7)  # 4 in the sample
        assert bool(value.shape[0] == 4)
    assert (len(sizes.guards), dict(sizes.replacements)) == before
    with internals.guards_ignored(internals.FakeTensorMode()):  # it has no free sizes
        pass


def test_replace_sizes_is_seen_at_once_and_undone(free_batch: torch.export.ExportedProgram) -> None:
    (*_, value) = (node.meta["val"] for node in free_batch.graph.find_nodes(op="placeholder"))
    size, sizes = value.shape[0].node, value.fake_mode.shape_env
    symbol = size.expr
    before = internals.replace_sizes(sizes, {symbol: sympy.Integer(7)})
    assert size.expr == 7
    internals.replace_sizes(sizes, before)
    assert size.expr == symbol


def test_no_new_guards_raises_what_is_not_known(free_batch: torch.export.ExportedProgram) -> None:
    (*_, value) = (node.meta["val"] for node in free_batch.graph.find_nodes(op="placeholder"))
    for context in (internals.guards_ignored, contextlib.nullcontext):
        with context(value.fake_mode):
            if context is internals.guards_ignored:
                assert bool(value.shape[0] < 8)  # what was answered there is not known for that
            with internals.no_new_guards(value.fake_mode):
                assert bool(value.shape[0] < 10)  # 9 at most
                with pytest.raises(Exception, match="8"):
                    bool(value.shape[0] < 8)
    with internals.no_new_guards(internals.FakeTensorMode()):
        pass


def test_symbol_ranges_are_those_of_the_free_sizes(free_batch: torch.export.ExportedProgram) -> None:
    value = free_batch.graph.find_nodes(op="placeholder")[-1].meta["val"]
    ((symbol, found),) = internals.symbol_ranges(value.fake_mode, value.shape).items()
    assert free_batch.range_constraints[symbol] == found
    assert (found.lower, found.upper) == (3, 9)
    assert internals.symbol_ranges(internals.FakeTensorMode(), (2, 3)) == {}


def test_size_function_knows_what_torch_writes_into_sizes() -> None:
    assert issubclass(internals.size_function("FloorDiv"), sympy.Function)
    assert internals.size_function("no such name") is None
    assert internals.size_function("no such name", 1) == 1


def test_derived_dimension_is_a_linear_function_of_its_root() -> None:
    root = torch.export.Dim("n")
    assert internals.derived_dimension(2 * root + 1) == (root, 2, 1)
    assert internals.derived_dimension(root) is None
    assert internals.derived_dimension(torch.export.Dim.AUTO) is None


def test_dimension_hint_is_the_name_that_Dim_has_it_under() -> None:
    for name in ("AUTO", "DYNAMIC", "STATIC"):
        assert internals.dimension_hint(getattr(torch.export.Dim, name)) == name
    assert internals.dimension_hint(torch.export.Dim.DYNAMIC(min=2)) == "DYNAMIC"
    assert internals.dimension_hint(torch.export.Dim("n")) is None


# ---- dispatch


def test_TorchDispatchMode_sees_every_operator_of_its_thread() -> None:
    seen: list[object] = []

    class Watch(internals.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).sum()
    torch.ones(2)
    assert seen == [aten.ones.default, aten.sum.default]


def test_calls_kept_lets_a_graph_module_of_a_subclass_be_called_after_it_was_recompiled() -> None:
    module = fx.symbolic_trace(nn.Linear(3, 2))
    module.__class__ = type("Sub", (type(module),), {})
    with internals.calls_kept(module):
        module.recompile()
    assert module(torch.ones(4, 3)).shape == (4, 2)


def test_storage_users_counts_what_else_shares_the_memory() -> None:
    tensor = torch.ones(3)
    assert internals.storage_users(tensor) == 0
    view = tensor[1:]
    assert internals.storage_users(tensor) == 1
    array = tensor.numpy()
    assert internals.storage_users(tensor) == 2
    del view, array
    assert internals.storage_users(tensor) == 0


def test_untouched_by_torch_function_lets_operators_reach_the_dispatch_of_a_class() -> None:
    reached = []

    class Watched(torch.Tensor):
        __torch_function__ = internals.untouched_by_torch_function

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            reached.append(func)
            return torch.ones(())

    tensor = torch.Tensor._make_wrapper_subclass(Watched, (2,))  # type: ignore[attr-defined]
    assert torch.sum(tensor) == 1
    assert reached == [aten.sum.default]


def test_is_step_of_vmap_tells_what_enters_and_leaves_it_from_operators() -> None:
    class Mapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(torch.relu)(x)

    graph = torch.export.export(Mapped(), (torch.ones(2, 3),), strict=False).graph
    steps = [node for node in graph.nodes if internals.is_step_of_vmap(node.target)]
    assert any(not node.users for node in steps)
    assert [node.target for node in graph.nodes if node.op == "call_function" and node not in steps] == [
        aten.relu.default
    ]
