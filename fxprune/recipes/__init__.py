"""Recipes: the whole way of a model from its source to its files, said in tables, repeated and resumed."""

from fxprune.recipes.outcome import Outcome
from fxprune.recipes.recipe import Recipe, parsed, read, schema
from fxprune.recipes.running import run

__all__ = ["Outcome", "Recipe", "parsed", "read", "run", "schema"]
