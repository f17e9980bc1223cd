"""The recipe of the embedded base: `python -m spectral_diffusion.toyworld.recipe` (or `make base`)."""
