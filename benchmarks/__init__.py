"""Experiments: data in, one JSON per run out."""
