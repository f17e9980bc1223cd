"""Files for other tools: an adapter as a LoRA that AUTOMATIC1111, ComfyUI and diffusers read, its tokens beside it."""

from spectral_diffusion.export.kohya import Export, export_kohya
from spectral_diffusion.export.notes import instructions

__all__ = ["Export", "export_kohya", "instructions"]
