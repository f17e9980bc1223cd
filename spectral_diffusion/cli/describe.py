"""An adapter in words and as data, the same for every command that shows one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectral_diffusion.adapters.adapter import Adapter


def adapter_data(adapter: Adapter, path: Path) -> dict[str, Any]:
    """Return what the adapter in file `path` is, as plain data; bands as first and last direction."""
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "family": adapter.family,
        "fingerprint": adapter.fingerprint,
        "method": adapter.method,
        "parameters": sum(concept.parameters() for concept in adapter.concepts),
        "concepts": [
            {
                "token": concept.token,
                "class_word": concept.class_word,
                "band": [concept.band.start, concept.band.stop - 1] if concept.band else None,
                "parametrisation": concept.parametrisation,
                "strength": strength,
                "parameters": concept.parameters(),
                "layers": len(concept.layers),
                "token_vectors": concept.token_vectors,
                "layerwise_token": concept.is_layerwise,
                "settings": concept.settings,
            }
            for concept, strength in zip(adapter.concepts, adapter.weights, strict=True)
        ],
    }


def adapter_lines(data: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that show what `adapter_data` returned."""
    yield f"{data['path']} ({size_in_words(data['bytes'])})"
    yield f"  base        family {data['family']}, fingerprint {data['fingerprint'] or 'unknown'}"
    if len(data["concepts"]) > 1:
        yield f"  joined by   {data['method']}"
    yield f"  parameters  {data['parameters']:,}"
    for concept in data["concepts"]:
        where = f"directions {concept['band'][0]}-{concept['band'][1]} of " if concept["band"] else ""
        yield (
            f"  {concept['token']}  a {concept['class_word']}, strength {concept['strength']:g}, "
            f"{concept['parametrisation']}, {where}{concept['layers']} layers, "
            f"{concept['parameters']:,} parameters"
        )
        if concept["layerwise_token"]:
            yield "    a token with vectors of its own for every cross-attention layer; other tools get their mean"
        if among := concept["settings"].get("among"):
            yield f"    trained among {', '.join(among)}"


def size_in_words(size: int) -> str:
    """Return a number of bytes as people write it: `1.4 MB`."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
