"""The captured graphs and what is done to them: traced modules, edits, reparametrizations, equality, the plan."""
