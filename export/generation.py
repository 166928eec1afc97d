"""Greedy decoding of an exported decoder in onnxruntime, with its cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.calling import named_arguments
from fxprune.errors import ArgumentError, ArgumentTypeError, CompareError
from fxprune.graph.calls import as_call

from .session import Session

_PAST, _PRESENT = "past_key_values.", "present."


@named_arguments
def generate(
    path: str | os.PathLike[str],
    inputs: Tensor | Mapping[str, Tensor],
    *,
    max_new_tokens: int = 20,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    prefill: str | os.PathLike[str] | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Tensor:
    """Greedy tokens of a decoder that `to_onnx` wrote with its cache, run in onnxruntime step by step.

    The file's inputs and outputs have optimum's names: `input_ids`, `attention_mask`, `position_ids`,
    `past_key_values.0.key` and `.value`, `present.0.key` and `.value`, `logits`; of an encoder-decoder
    `decoder_input_ids`, `past_key_values.0.decoder.key`, `past_key_values.0.encoder.key` and so on. What of these the
    file takes is given. The first step runs on an empty cache, unless `prefill` is another file for it, as an
    encoder-decoder needs.

    Args:
        path: the file of the step with a cache.
        inputs: identifiers of shape (batch, length), or a dict of these and of more inputs by name. Prompts of several
            lengths are padded on the left, with an `attention_mask` of zeros there.
        max_new_tokens: how many steps at most.
        eos_token_id: what ends a sequence, or several such; None: nothing.
        pad_token_id: what stands behind the end of a sequence while others go on.
        prefill: the file of the first step, which takes no cache; None: `path`.
        providers: onnxruntime's.

    Returns:
        The identifiers given and those that follow, of shape (batch, length + steps), as eager `generate` does with
        `do_sample=False`.

    Raises:
        ArgumentError: the file takes no cache, or an input is missing. CompareError: it cannot be loaded or run.
        ArgumentTypeError: `inputs` hold no identifiers, or a number is none.

    Example:
        >>> fxprune.export.generate("decoder.onnx", torch.tensor([[1, 5, 7]]), max_new_tokens=2).shape
        torch.Size([1, 5])
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ArgumentTypeError(f"max_new_tokens={max_new_tokens!r}: a number of 0 or more is needed.")
    step = Session(path, providers, tf32=True)
    first = step if prefill is None else Session(prefill, providers, tf32=True)
    if not any(name.startswith(_PAST) for name in step.inputs):
        raise ArgumentError(
            f"'{path}' takes no cache: its inputs are {', '.join(step.inputs)}. Trace the decoder with "
            "past_key_values=DynamicCache(...) that holds something, and with free sizes: docs/libraries.md shows it."
        )
    ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ()))
    state = _State.of(step, inputs)
    finished = torch.zeros(len(state.tokens), dtype=torch.bool)
    for index in range(max_new_tokens):
        session = step if index else first
        outputs = session.run((), state.feed(session, is_first=index == 0))
        found = outputs["logits"][:, -1].argmax(-1)
        found = torch.where(finished, pad_token_id, found)
        finished |= torch.isin(found, ends)
        state.take(found, outputs)
        if ends.numel() and finished.all():
            break
    return state.tokens


@dataclass
class _State:
    """What goes from step to step.

    Attributes:
        name: of the input that takes identifiers.
        tokens: the identifiers so far, (batch, length). mask: which of them count.
        given: the caller's other inputs. kept: outputs of the steps before that later ones take, by the inputs' names.
    """

    name: str
    tokens: Tensor
    mask: Tensor
    given: dict[str, Tensor]
    kept: dict[str, Tensor]

    @classmethod
    def of(cls, session: Session, inputs: Tensor | Mapping[str, Tensor]) -> _State:
        name = next((name for name in ("decoder_input_ids", "input_ids") if name in session.inputs), "input_ids")
        args, given = as_call(inputs, error=ArgumentTypeError)
        values = given | ({name: args[0]} if args else {})
        tokens = values.pop(name, None)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            found = list(tokens.shape) if isinstance(tokens, Tensor) else sorted(values)
            raise ArgumentTypeError(f"generate needs {name} of shape (batch, length); given were {found}.")
        mask = values.pop("attention_mask", None) if name == "input_ids" else None
        return cls(name, tokens, torch.ones_like(tokens) if mask is None else mask, values, {})

    def feed(self, session: Session, *, is_first: bool) -> dict[str, Tensor]:
        """The inputs of the next step, those that the file takes."""
        return {name: self._input(session, name, is_first) for name in session.inputs}

    def _input(self, session: Session, name: str, is_first: bool) -> Tensor:
        new = slice(None) if is_first else slice(-1, None)
        if name == self.name:
            return self.tokens[:, new]
        if name == "attention_mask" and self.name == "input_ids":
            return self.mask
        if name == "position_ids":
            return (self.mask.cumsum(-1) - 1).clamp(min=0)[:, new]
        if name in self.kept:
            return self.kept[name]
        if name in self.given:
            return self.given[name]
        if name.startswith(_PAST):
            return _empty(session, name, len(self.tokens))
        raise ArgumentError(f"'{session.name}' takes {name!r}, which was not given. Give it by name.")

    def take(self, found: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Take what a step gave: one more identifier for each sequence, and the cache."""
        self.tokens = torch.cat([self.tokens, found[:, None].to(self.tokens.dtype)], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        for name, value in outputs.items():
            if name.startswith(_PRESENT):
                self.kept[_PAST + name.removeprefix(_PRESENT)] = value
            elif name == "encoder_last_hidden_state":
                self.kept["encoder_outputs_last_hidden_state"] = value


def _empty(session: Session, name: str, batch: int) -> Tensor:
    """A cache without entries, of the heads and the head size that the file has."""
    shape = session.shapes[name]
    if len(shape) != 4 or not isinstance(shape[2], str):
        raise CompareError(
            f"'{session.name}' takes {name!r} of shape {list(shape)}, whose axis 2, the entries so far, is not free: "
            "it cannot start empty. Trace with that axis free, or give `prefill` the file of the first step."
        )
    dtype = torch.float64 if "double" in session.inputs[name] else torch.float32  # half floats are rounded to
    return torch.zeros((batch, shape[1], 0, shape[3]), dtype=dtype)
