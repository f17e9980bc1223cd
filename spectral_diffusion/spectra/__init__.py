"""Singular directions of a base's layers, and the bands of them that concepts get."""
