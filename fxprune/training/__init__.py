"""Training with masks: clipped gradients, and an optimizer that goes on after removal."""
