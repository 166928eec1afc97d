"""Checkpoints without pickle: saving, loading, into a model or without one."""
