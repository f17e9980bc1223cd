"""Spectral Diffusion: train each concept on its own band of singular directions, then sum them."""
