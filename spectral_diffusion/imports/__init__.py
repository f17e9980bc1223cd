"""Ordinary LoRAs of other programs as adapters, to be fused beside spectral ones, compared and exported again."""

from spectral_diffusion.imports.lora import import_lora

__all__ = ["import_lora"]
