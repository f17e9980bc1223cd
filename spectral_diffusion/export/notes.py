"""Where exported files go in other tools, and what to type there."""

from __future__ import annotations

from collections.abc import Iterator

from spectral_diffusion.export.kohya import Export


def instructions(export: Export, family: str) -> Iterator[str]:
    """Yield a line for each tool that reads the files of `export`, made for bases of `family`."""
    lora, words = export.lora.name, list(export.trigger_words.values())
    embeddings = ", ".join(path.name for path in export.embeddings.values())
    yield (
        f"AUTOMATIC1111: put {lora} and {export.description.name} into models/Lora, {embeddings} into embeddings; "
        f"type: <lora:{export.lora.stem}:1> {' and '.join(words)}"
    )
    yield (
        f"ComfyUI: put {lora} into models/loras, {embeddings} into models/embeddings; "
        f"load the LoRA and type: {' and '.join(f'embedding:{word}' for word in words)}"
    )
    if family == "mini":
        yield "This adapter belongs to the embedded base, which only diffusers loads."
