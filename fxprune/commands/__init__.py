"""Commands that take a model by its name: pruning by flags or by a recipe, and looking at what there is."""
