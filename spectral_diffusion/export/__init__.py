"""Files for other tools: an adapter as a LoRA, as embeddings of its tokens, or merged into a whole checkpoint."""

from spectral_diffusion.export.checkpoint import export_checkpoint
from spectral_diffusion.export.embedding import export_embeddings
from spectral_diffusion.export.factors import PRECISIONS
from spectral_diffusion.export.kohya import export_kohya
from spectral_diffusion.export.peft import export_diffusers
from spectral_diffusion.export.result import Export, places, remarks

__all__ = [
    "PRECISIONS",
    "Export",
    "export_checkpoint",
    "export_diffusers",
    "export_embeddings",
    "export_kohya",
    "places",
    "remarks",
]
