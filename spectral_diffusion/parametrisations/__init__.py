"""How one concept's change of a layer is parametrised: interchangeable forms, one file each, same functions in each.

A form is a module with

- `TENSORS`: names of its trained tensors,
- `initial(band) -> dict[str, Tensor]`: trained tensors, all zero, so that nothing changes at the start,
- `factors(band, tensors) -> (up (out, k), down (in, k))`: the change of the weight is `up @ down.T`,
- `confine(tensors, U_kept, V_kept)`: make the tensors respect directions that belong to other concepts.

The last two dimensions are the layer's; where others stand before them, each function works on many layers at once.
"""

from spectral_diffusion.parametrisations import additive, lora, rotational

PARAMETRISATIONS = {"additive": additive, "rotational": rotational}
"""Name to module of every parametrisation that a concept can be trained in."""

FORMS = PARAMETRISATIONS | {"lora": lora}
"""Name to module of every form that a concept's change can have: an imported LoRA has no band, only `TENSORS` and `factors`."""
