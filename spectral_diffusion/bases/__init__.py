"""Stable Diffusion checkpoints of every family: recognised, read, and the names and shapes of their layers."""
