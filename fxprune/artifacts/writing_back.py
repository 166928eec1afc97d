"""`write_back`: the sizes and values of a finalized graph, put back into the user's own class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from fxprune.artifacts.attribute_reads import Reads, recorded_reads
from fxprune.artifacts.effort import Effort
from fxprune.artifacts.following_configurations import sizes_as_configured, warn_of_refusal, warn_of_sizes
from fxprune.artifacts.gone_blocks import without_gone_blocks
from fxprune.artifacts.other_forms import follow_other_forms, other_forms
from fxprune.artifacts.plain_copy import plain_copy
from fxprune.artifacts.plain_layers import put_plain_layers
from fxprune.artifacts.rehearsal import Rehearsal
from fxprune.artifacts.restoring_norms import restore_weight_norms
from fxprune.artifacts.statistics import check_statistics, counting, put_eps
from fxprune.artifacts.trial import Search, by_its_parts
from fxprune.artifacts.values import LeftOut, LeftOver, check_same_model, put_values, set_left_over
from fxprune.artifacts.working_copy import WorkingCopy
from fxprune.calling import named_arguments
from fxprune.errors import ArgumentTypeError, WriteBackError
from fxprune.graph.configurations import Builds, Configuration, unread_tensors
from fxprune.graph.kept_tensors import forget_kept_tensors
from fxprune.graph.names import tensors_of
from fxprune.graph.reparametrizations import reparametrized
from fxprune.graph.requirements import require_eval
from fxprune.graph.spread_modules import in_one_process
from fxprune.graph.traced import TracedModule
from fxprune.progress import shown


@named_arguments
@in_one_process
@shown("write back")
def write_back(final: TracedModule, model: nn.Module) -> nn.Module:
    """The user's own module, shrunk: a copy of `model` with the parameters, buffers and sizes of `final`.

    The copy has the class, the submodules, the mode and the flags `requires_grad` of `model`, and carries no masks,
    norms or parametrizations, whether `model` does or not. Sizes that torch's own layers keep as attributes
    (`in_channels`, `groups`, `num_features`, `normalized_shape` and the like) follow from the parameters. The integers
    of the user's modules (also in lists, and in a configuration object that one module alone holds) that could follow
    from a size are found by trying: each module's results are compared with the values in the graph. The whole is then
    run in eval mode on the sample inputs, at another batch size where that is free, and compared with `final`; in
    train mode it must run, where `final` has that graph.

    A bias that finalize or `reconstruct` created becomes a parameter: a key that `model` has not. Where the class
    has one size for several (the heads of queries, keys and values), the channels that it cannot go without come back
    as zeros, so a layer can be larger than in `final`; whole heads (`kinds` of `fxprune.prune.channels`) always fit.
    A layer that left the graph is still called by the class: it keeps what its neighbours' sizes leave of it. A
    folded batch norm becomes the identity, and a convolution that standardized its weight over channels of which some
    went (`plan.held`) one of torch's own. An RMS norm of a narrowed stream, or a global response norm, gets the gain
    and the eps that count the channels which went; layer and group norms cannot count them, and are refused by name.

    A class that is built from its `config`, as those of transformers are, gets one that says the new sizes, where it
    can, and the weight norms that it builds itself: then `save_pretrained` and `from_pretrained` go on as before. So do
    the outermost modules of such classes within a model that has no configuration.
    Integers of its modules that follow from a configuration are what the class makes of these sizes, also where only
    calls of another form read them, as with a mask. Channels that nobody chose, and that are dead all the same, come
    back as zeros where a configuration says the sizes then. `fxprune.prune.channels(..., runnable=model)` chooses
    channels so that a configuration can say the sizes. A residual block of which the graph has nothing left, as its
    branches are zero, leaves the list that it is in where the configuration can say that: those behind it count anew.

    Args:
        final: what `fxprune.finalize` returned, shrunk or not.
        model: the eager module that was traced, or one of the same architecture; stays as it is.

    Returns:
        A new module of `model`'s class, independent of both, on the device of `final`.

    Raises:
        WriteBackError: `model` has other parameters than `final` comes from, its class has no place for a bias or for a
            map of positions (`keep_for_write_back` of `finalize`), or fixes a size in its code, or takes statistics
            over channels of which some went; names module, class and line. Or a tensor of `model` is on the meta
            device.
        ArgumentTypeError: `final` is no traced module, or `model` no eager one.

    Warns:
        ConfigurationWarning: no configuration gives these sizes, of the model or of a module that it names.

    Example:
        >>> small = fxprune.write_back(fxprune.finalize(traced), model)
        >>> small.conv1.out_channels, model.conv1.out_channels
        (8, 16)
    """
    if not isinstance(final, TracedModule) or not isinstance(model, nn.Module) or isinstance(model, fx.GraphModule):
        raise ArgumentTypeError(
            f"write_back was given a {type(final).__name__} and a {type(model).__name__}; it takes what "
            f"fxprune.finalize returns, and the eager module that was traced.{_way_to_both(final, model)}"
        )
    require_eval(final, "write_back", WriteBackError)
    if empty := [name for name, tensor in tensors_of(model).items() if tensor.is_meta]:
        raise WriteBackError(
            f"{', '.join(empty[:5])} of the given {type(model).__name__} are on the meta device, without values. Build "
            "it on another: what the graph does not read is taken from it."
        )
    if left := reparametrized(final):
        raise WriteBackError(f"{', '.join(left[:5])}: still reparametrized. Give what fxprune.finalize returns.")
    return written_with_zeros(final, model)[0]


def written_with_zeros(
    final: TracedModule, model: nn.Module, builds: Builds | None = None
) -> tuple[nn.Module, list[str], list[str]]:
    """What `write_back` returns, and the paths of modules that took channels back as zeros.

    Where some did, last the path of the first module that computed something else before, if one did. `builds` is what
    the class made of other configurations before.

    Raises:
        WriteBackError: as `write_back`.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fewer = without_gone_blocks(final, model)
    if fewer is not None:
        try:
            return _written(*fewer, None)
        except WriteBackError:  # with zeros in their place it may be another model's
            pass
    return _written(final, model, builds)


def _written(final: TracedModule, model: nn.Module, builds: Builds | None) -> tuple[nn.Module, list[str], list[str]]:
    """As above, with as many modules as there are."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        written = beside(final, plain_copy(model))
        put_plain_layers(written, final)
        flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        copied = WorkingCopy(written, final)
        unread = unread_tensors(written, final.graphs.values()) - copied.plan.kept.keys()
        configurations = Configuration.all_of(model, unread, builds=builds)
        said, search = _write(copied, flags, configurations)
        forget_kept_tensors(written)
        for configuration in configurations:
            restore_weight_norms(written.get_submodule(configuration.path), configuration.model)
            if configuration.path in said:
                warn_of_refusal(written, configuration)
            else:
                warn_of_sizes(written, configuration, (final.example_args, final.example_kwargs))
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in written.named_modules():
        module.training = modes[path]
    if not search.zeros.any_taken:
        return written, [], []
    first = search.disagreeing
    return written, [copied.paths(m)[0] for m in search.filling_up], [] if first is None else copied.paths(first)[:1]


def beside(final: TracedModule, copied: nn.Module) -> nn.Module:
    """The copy of a model, moved to where the finalized module is, if that is on one device: both run on one sample."""
    devices = {tensor.device for tensor in tensors_of(final).values()}
    if len(devices) == 1 and not devices >= {tensor.device for tensor in tensors_of(copied).values()}:
        copied.to(devices.pop())
    return copied


def _way_to_both(final: object, model: object) -> str:
    if isinstance(model, TracedModule) and isinstance(final, nn.Module) and not isinstance(final, TracedModule):
        return " They are swapped: write_back(final, model)."
    if isinstance(model, Mapping):
        return " Build the model, and load these into it."
    if isinstance(model, type):
        return " Give an instance of the class."
    return ""


def _write(
    copy: WorkingCopy, flags: dict[str, bool], configurations: Sequence[Configuration]
) -> tuple[set[str], Search]:
    """Give the copy values, sizes and the integers that follow, and check what it computes.

    Returns:
        The paths of the configurations that say the sizes, and the search for integers with what it found.

    Raises:
        WriteBackError: as `write_back`.
    """
    check_same_model(copy)
    check_statistics(copy)
    rehearsal = Rehearsal(copy)
    reads, work = rehearsal.in_best_precision(lambda: _watched_run(rehearsal))
    forms = other_forms(copy.root, lambda: rehearsal.run_copy(rehearsal.dense_inputs))
    left_over = put_values(copy, flags)
    put_eps(copy)
    rehearsal.convert_tensors()
    search = Search(copy, rehearsal, reads, work)

    def said() -> set[str]:  # where any does, all computes what it should
        return {own.path for own in configurations if sizes_as_configured(copy, own, search.zeros, rehearsal)}

    paths = said()
    if not paths:
        refusal = _find_integers(search, left_over)
        if refusal is not None:
            search.begin_again()
            if rehearsal.return_to_own_precision():
                # what code rounds to float32 in any case, as angles of positions, is not what is computed in float64
                refusal = _find_integers(search, left_over)
        if refusal is not None:
            raise refusal
        paths = said()
    follow_other_forms(search, forms, lambda: rehearsal.run_copy(rehearsal.inputs))
    if rehearsal.return_to_own_precision() and (worst := rehearsal.difference_on_samples()):
        raise WriteBackError(f"an output differs by {worst:.1e} relative in the model's own precision.")
    if "train" in copy.final.graphs:
        rehearsal.run_copy(rehearsal.inputs, train=True)
    return paths, search


def _find_integers(search: Search, left_over: Sequence[LeftOver]) -> WriteBackError | None:
    """Find the integers with which a copy computes what the graph does, and channels that its class needs as zeros.

    Returns:
        What to raise where it runs with some, but computes something else with all.

    Raises:
        WriteBackError: it runs with none.
    """
    states = list(LeftOut) if left_over else [LeftOut.AS_IN_THE_MODEL]
    if not any(left.is_cut for left in left_over):
        states = [state for state in states if state is not LeftOut.WHOLE]
    refusal: WriteBackError | None = None
    for state in states:
        search.zeros.give_up()
        set_left_over(left_over, state)
        search.zeros.kept.update((left.name, left.channels_of(state)) for left in left_over)
        try:
            worst = _difference_found(search)
        except WriteBackError:
            if refusal is None:
                raise
            break  # what was said first is nearer to what is wrong
        if not worst:
            return None
        refusal = _other_results(search.copy, search.disagreeing, worst)
    return refusal


def _difference_found(search: Search) -> float:
    """How far the copy is from the graph with the integers that are found for it; 0 where it computes the same.

    Raises:
        WriteBackError: it runs with no integers.
    """
    search.run()
    search.derive()
    worst = search.rehearsal.difference()
    if worst and search.run_wider():
        search.derive()
        if search.is_smaller():  # else all came back, and nothing is won
            worst = search.rehearsal.difference()
    return worst


def _watched_run(rehearsal: Rehearsal) -> tuple[Reads, float]:
    """The attributes that one run of the model as it is reads, and the work of its largest call."""
    with recorded_reads(rehearsal.copy.root) as reads, by_its_parts(), Effort() as effort:
        rehearsal.run_copy(rehearsal.dense_inputs)
    return reads, effort.largest


def _other_results(copy: WorkingCopy, disagreeing: nn.Module | None, worst: float) -> WriteBackError:
    first = "" if disagreeing is None else f" first at {copy.where(disagreeing)},"
    places = [] if disagreeing is None else copy.paths(disagreeing)[:1]
    return WriteBackError(
        f"{type(copy.root).__name__} runs with the sizes of the finalized model, but an output differs,{first} "
        f"by {worst:.1e} relative. Its code computes with a size that is no attribute, or it is another model "
        f"than the one that was traced.{counting(copy)}",
        [*copy.plan.counting, *places],
    )
