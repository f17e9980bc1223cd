"""How one concept's change of a layer is parametrised: interchangeable forms, one file each, same functions in each.

A spectral form is a module with

- `TENSORS`: names of its trained tensors,
- `initial(band) -> dict[str, Tensor]`: trained tensors, all zero, so that nothing changes at the start,
- `factors(band, tensors) -> (up (out, k), down (in, k))`: the change of the weight is `up @ down.T`,
- `balanced(band) -> Spectrum`: the same part of the weight, written as a training works on it; `factors` take either,
- `kept(s, tensors)`, `resumed(s, tensors)`: what was trained on the balanced band, for the band itself, and back,
- `confine(tensors, U_kept, V_kept)`: make the tensors respect directions that belong to other concepts.

The last two dimensions are the layer's; where others stand before them, each function works on many layers at once.

A rival has no band of the layer's own directions. It is a module with

- `begin(site) -> Beginning`: what is trained, and the factors as a function of it; no change at the start,

or one of PEFT's tuners (`training/tuners.py`). What a rival has trained is kept as a LoRA, or as a dense matrix where thin
factors would be larger.
"""

from spectral_diffusion.parametrisations import additive, dense, lidb, lora, orthogonal, rotational, svdiff

SPECTRAL = {"additive": additive, "rotational": rotational}
"""Name to module of the forms that live on a band of singular directions."""

RIVALS = {"lora": lora, "orthogonal": orthogonal, "lidb": lidb, "svdiff": svdiff}
"""Name to module of the other forms, for comparison."""

TUNERS = ("dora", "adalora", "oft", "vera")
"""Forms that PEFT trains, for comparison."""

PARAMETRISATIONS = (*SPECTRAL, *RIVALS, *TUNERS)
"""Every parametrisation that a concept can be trained in."""

BANDED = (*SPECTRAL, "orthogonal")
"""Those of which every concept needs a band of its own."""

FORMS = SPECTRAL | {"lora": lora, "dense": dense}
"""Name to module of every form that a concept's change is kept in; those without a band have only `TENSORS` and `factors`."""
