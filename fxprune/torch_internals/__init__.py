"""Everything private of torch that the library relies on: one function or name each, one test each.

What belongs here: names with a leading underscore, in modules or on objects, and undocumented attributes. A release of
torch that changes one of them fails the test of that name in `tests/fxprune/test_torch_internals*.py`, which checks the
behaviour that is relied on. `_parameters`, `_buffers`, `_modules` and `_forward_pre_hooks` of modules, and
`torch.utils._pytree`, stay where they are used: torch's own extensions build on them.
"""

from torch._export.verifier import TrainingIRVerifier
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.pt2_archive._package import _load_exported_programs as programs_in
from torch.fx.graph import _PyTreeCodeGen as PyTreeCodeGen
from torch.fx.graph import _PyTreeInfo as PyTreeInfo
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.utils.parametrizations import _Orthogonal as Orthogonal
from torch.nn.utils.parametrizations import _WeightNorm as WeightNormParametrization
from torch.nn.utils.prune import _validate_pruning_amount_init as validate_pruning_amount
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.torch_internals.captures import (
    LOGGERS_OF_FAILED_CAPTURES,
    any_recurrent_length,
    conversions_checked,
    derived_dimension,
    dimension_hint,
    distributions_unchecked,
    functions_applied,
    guards_ignored,
    indices_recorded,
    no_new_guards,
    replace_sizes,
    size_expression,
    size_function,
    sizes_watched,
    symbol_ranges,
    values_known,
)
from fxprune.torch_internals.graphs import (
    calls_kept,
    fake_cpu_tensor,
    fake_like,
    fake_tensor,
    functional_twin,
    is_composite,
    is_erased,
    is_step_of_vmap,
    overload_of_custom_operator,
    pytree_info,
    register_named_tuple,
    schema_of,
    state_of_generated_code,
    storage_users,
    symbolic_square_root,
    untouched_by_torch_function,
)
from fxprune.torch_internals.modules import (
    flat_weight_names,
    fuses_in_eval,
    has_forward,
    is_inside_step,
    name_pruning_method,
    pruned_tensor,
    pruning_methods,
    step_pre_hooks,
    weights_gathered_if,
)
from fxprune.torch_internals.shards import (
    ASKED_BEFORE_BROADCAST,
    decompositions_set_aside,
    dtype_of_calls,
    follow_parameters,
    forget_sharding,
    sharding_options,
    spread_before,
    take_parameters,
)

__all__ = [
    "ASKED_BEFORE_BROADCAST",
    "LOGGERS_OF_FAILED_CAPTURES",
    "ConvNd",
    "ConvTransposeNd",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "Orthogonal",
    "PyTreeCodeGen",
    "PyTreeInfo",
    "TorchDispatchMode",
    "TrainingIRVerifier",
    "WeightNormParametrization",
    "any_recurrent_length",
    "calls_kept",
    "conversions_checked",
    "decompositions_set_aside",
    "derived_dimension",
    "dimension_hint",
    "distributions_unchecked",
    "dtype_of_calls",
    "fake_cpu_tensor",
    "fake_like",
    "fake_tensor",
    "flat_weight_names",
    "follow_parameters",
    "forget_sharding",
    "functional_twin",
    "functions_applied",
    "fuses_in_eval",
    "guards_ignored",
    "has_forward",
    "indices_recorded",
    "is_composite",
    "is_erased",
    "is_inside_step",
    "is_step_of_vmap",
    "name_pruning_method",
    "no_new_guards",
    "overload_of_custom_operator",
    "programs_in",
    "pruned_tensor",
    "pruning_methods",
    "pytree_info",
    "register_named_tuple",
    "replace_sizes",
    "schema_of",
    "sharding_options",
    "size_expression",
    "size_function",
    "sizes_watched",
    "spread_before",
    "state_of_generated_code",
    "step_pre_hooks",
    "storage_users",
    "symbol_ranges",
    "symbolic_square_root",
    "take_parameters",
    "untouched_by_torch_function",
    "validate_pruning_amount",
    "values_known",
    "weights_gathered_if",
]
