"""The modules below a traced one: no graph runs them, so what is set on them acts on the graphs, or is refused."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, Protocol

from torch import nn

from fxprune.errors import CaptureError
from fxprune.torch_internals import forget_sharding

_OWNER = "fxprune.owner"  # no name of a child, a parameter or a buffer has a dot


class Owner(Protocol):
    """What the graphs belong to."""

    def switch(self, part: nn.Module, mode: bool) -> None:
        """Select train or eval mode for one part."""

    def set_option(self, part: nn.Module, name: str, value: Any) -> None:
        """Change a number that the calls of one part were captured with."""

    def option_of(self, part: nn.Module, name: str) -> Any:
        """A number that the calls of one part have; raises NameLookupError where they have none of that name."""


def adopt(owner: Owner, root: nn.Module) -> None:
    """Let the parts below `root` act on the graphs of `owner`."""
    reference = weakref.ref(owner)
    for module in root.modules():
        if isinstance(module, Part):
            vars(module)[_OWNER] = reference


class Part(nn.Module):
    """A module below a traced one."""

    def train(self, mode: bool = True) -> Part:
        """Train or eval mode of this part in the train graph; see `TracedModule.switch`."""
        owner = _owner_of(self)
        if owner is None:
            super().train(mode)
        else:
            owner.switch(self, mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises CaptureError: the graphs are those of the whole."""
        raise CaptureError(
            "a module below a traced one was to be called. It holds parameters; the graphs run the operators of the "
            "whole. Call the traced module; to run a part alone, trace it as a model of its own: "
            "fxprune.trace(model.backbone, inputs)."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        owner = _owner_of(self)
        if owner is None or name.startswith("_") or name in self._parameters or name in self._buffers:
            super().__setattr__(name, value)
        elif name != "training":
            owner.set_option(self, name, value)
        elif value != self.training:
            owner.switch(self, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            owner = _owner_of(self)
            if name.startswith("_") or owner is None:
                raise
        return owner.option_of(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != _OWNER}

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        return _hooked(self, super().register_forward_hook, args, kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        return _hooked(self, super().register_forward_pre_hook, args, kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        return _hooked(self, super().register_full_backward_hook, args, kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        return _hooked(self, super().register_full_backward_pre_hook, args, kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        return _hooked(self, super().register_backward_hook, args, kwargs)


def _owner_of(part: nn.Module) -> Any:
    """What the part acts on; None for one of its own, such as a copy."""
    reference = vars(part).get(_OWNER)
    return None if reference is None else reference()


def _hooked(part: nn.Module, register: Any, args: Any, kwargs: Any) -> Any:
    if _owner_of(part) is None:
        return register(*args, **kwargs)
    forget_sharding(part)
    raise CaptureError(
        "a hook was to be registered on a module below a traced one. The graphs run operators, no modules, so it would "
        "never be called. Register it on the eager model before fxprune.trace, which captures what it computes; watch "
        "values of the traced module by torch.fx.Interpreter; hooks on the traced module itself, on parameters and on "
        "tensors work. FSDP shards the traced module as a whole: fully_shard(traced)."
    )


def refuse_replacement(path: str) -> NoReturn:
    """Raise for a module that was to take the place of a captured one."""
    raise CaptureError(
        f"the module {path!r} of a traced module was to be replaced. The graphs would go on with the operators and "
        "parameters that were captured. Replace it in the eager model, and trace that again; values alone can be "
        f"copied: traced.get_parameter('{path}.weight').data.copy_(...)."
    )
