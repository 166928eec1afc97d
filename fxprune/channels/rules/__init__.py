"""The operators that are known, a file a family; importing this package registers them."""

from fxprune.channels.rules import (
    attention,
    contractions,
    convolutions,
    creation,
    grouped_products,
    joining,
    normalization,
    pointwise,
    recurrent,
    reductions,
    selection,
    shuffles,
    symbolic,
    views,
    writing,
)

__all__ = [
    "attention",
    "contractions",
    "convolutions",
    "creation",
    "grouped_products",
    "joining",
    "normalization",
    "pointwise",
    "recurrent",
    "reductions",
    "selection",
    "shuffles",
    "symbolic",
    "views",
    "writing",
]
