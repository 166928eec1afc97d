"""Names of modules, parameters and buffers: dotted paths joined, looked up and matched."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable

import torch
from torch import nn

from fxprune.errors import NameLookupError


def join(prefix: str, name: str) -> str:
    """The dotted path of `name` below `prefix`, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def locate(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module that holds `target` (a dotted path) and the last part of its name; raises AttributeError."""
    path, _, attribute = target.rpartition(".")
    return root.get_submodule(path), attribute


def tensor_at(root: nn.Module, target: str) -> torch.Tensor:
    """The parameter or buffer that a `get_attr` node with this target reads; also the body of control flow."""
    owner, attribute = locate(root, target)
    value: torch.Tensor = getattr(owner, attribute)
    assert isinstance(value, torch.Tensor | nn.Module), target
    return value


def exists(root: nn.Module, target: str) -> bool:
    """Whether a parameter, buffer or module stands under this name, or what is computed in the place of one."""
    path, _, attribute = target.rpartition(".")
    owner: nn.Module | None = root
    for part in path.split(".") if path else ():
        owner = None if owner is None else owner._modules.get(part)
    if owner is None:
        return False
    held = (owner._parameters, owner._buffers, owner._modules, vars(owner))
    return any(attribute in found for found in held) or hasattr(type(owner), attribute)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every name that it has, parameters first."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def parameter_count(module: nn.Module) -> int:
    """The number of entries of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def has_parametrization(owner: nn.Module, tensor: str) -> bool:
    """Whether `owner` holds `parametrizations.<tensor>`."""
    holder = owner._modules.get("parametrizations")
    return holder is not None and tensor in holder._modules


class ModulePaths:
    """Where every module of `root` stands, looked up once: for work on many parameters that moves no module.

    Example:
        >>> ModulePaths(model).canonical("decoder.weight")
        'encoder.weight'
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._paths: dict[nn.Module, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(path)

    def of(self, module: nn.Module) -> list[str]:
        """Every dotted path under which `module` stands (a shared module has several); none for a stranger."""
        return self._paths.get(module, [])

    def names(self, name: str) -> list[str]:
        """Every dotted name of what stands under `name`; raises AttributeError where its module does not exist."""
        owner, attribute = locate(self.root, name)
        return [join(path, attribute) for path in self.of(owner)]

    def canonical(self, name: str) -> str:
        """The first of a parameter's names where its module stands in several places; an unknown name as it is."""
        try:
            return self.names(name)[0]
        except AttributeError:
            return name


def names_of(root: nn.Module, owner: nn.Module) -> list[str]:
    """Every dotted path under which `owner` stands in `root`; for many modules ask one `ModulePaths`."""
    return [name for name, module in root.named_modules(remove_duplicate=False) if module is owner]


def canonical(root: nn.Module, name: str) -> str:
    """`ModulePaths.canonical` for a single name."""
    return ModulePaths(root).canonical(name)


def match_names(names: Iterable[str], pattern: str, kind: str = "parameter") -> list[str]:
    """The names that `pattern` (exact, or with the wildcards * ? [seq]) stands for.

    Raises:
        NameLookupError: nothing matches; the message lists near names.
    """
    names = list(dict.fromkeys(names))
    if not isinstance(pattern, str):
        raise NameLookupError(
            f"a {kind} is named by a string such as 'conv1.weight', got {type(pattern).__name__}."
            f"{_way_to_a_name(pattern)}"
        )
    found = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
    if not found:
        parts = [n for n in names if n.endswith("." + pattern) or n.startswith(pattern + ".")]
        why = f"{len(parts)} names end or begin with it" if len(parts) > 1 else "no such name"
        near = parts or difflib.get_close_matches(pattern, names, 5, 0.5) or names[:5]
        raise NameLookupError(f"{kind} {pattern!r}: {why}. Did you mean {', '.join(map(repr, near[:8]))}?")
    return found


def _way_to_a_name(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], nn.Module):
        return " Of a pair (module, 'weight'), give the module's path and the name: 'conv1.weight'."
    if isinstance(value, list | tuple | set | dict):
        return " Several are named by a pattern such as '*.weight', or one after another."
    if isinstance(value, torch.Tensor):
        return " The names of tensors are those of named_parameters()."
    return ""


def one_name(names: Iterable[str], pattern: str, kind: str = "parameter") -> str:
    """The single name that `pattern` stands for; raises NameLookupError for none and for several."""
    found = match_names(names, pattern, kind)
    if len(found) > 1:
        raise NameLookupError(
            f"{kind} {pattern!r} is ambiguous here, it matches {len(found)}: {', '.join(found[:8])}. Name one of them."
        )
    return found[0]
