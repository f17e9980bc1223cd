"""What the experiments share: the base, the judges, and trained adapters that are kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.lab.lost import Own, lost, own_predictions
from benchmarks.lab.record import Postponed, digest
from spectral_diffusion.adapters.adapter import Adapter
from spectral_diffusion.adapters.adapter_file import load_adapter, save_adapter
from spectral_diffusion.adapters.band_plan import fewest_directions
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.concepts.concept import SAMPLES_FOLDER, SETTINGS_FILE, Concept, load_concept
from spectral_diffusion.generation.drawing import Drawing, Picture
from spectral_diffusion.generation.generate import generate
from spectral_diffusion.parametrisations import BANDED
from spectral_diffusion.scoring.clip_scorer import ClipScorer, load_scorer
from spectral_diffusion.spectra.bands import Band, bands_in_order
from spectral_diffusion.toyworld.characters import HELD_OUT_CHARACTERS, SAMPLE_CONCEPTS
from spectral_diffusion.toyworld.judge import Judge, load_judge
from spectral_diffusion.toyworld.recipe.concepts import render_concept
from spectral_diffusion.toyworld.sprites import fetch_sprites
from spectral_diffusion.training import TrainingSettings, preset, train_together
from spectral_diffusion.training.settings import LINEAR

PATIENCE = 1.0
"""Seconds until somebody who wants what is in training elsewhere does something else."""
PROMPTS = ("{} near a lake", "a photo of {} in the snow", "{} on the beach", "{} in the city", "a picture of {} in the forest")


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Means over pictures: the judge's share right, CLIP to the photos, CLIP to the prompt with class words."""

    identity: float
    clip_image: float
    clip_text: float


@dataclass(frozen=True)
class Workshop:
    """Where trained adapters are kept, and what is loaded or made once."""

    adapters: Path
    owns: dict[str, Own] = field(default_factory=dict)

    @cached_property
    def base(self) -> Base:
        """The embedded base."""
        return load_base()

    @cached_property
    def scorer(self) -> ClipScorer:
        """The embedded CLIP."""
        return load_scorer(device=self.base.device)

    @cached_property
    def judge(self) -> Judge:
        """The judge."""
        return load_judge(device=self.base.device)

    def concept(self, name: str) -> Concept:
        """Return a sample concept, or another character that the base does not know, rendered where none was before.

        Raises:
            RuntimeError: the drawings of the toy world could not be fetched.
        """
        if name in SAMPLE_CONCEPTS:
            return load_concept(SAMPLES_FOLDER / name)
        folder = self.adapters.parent / "concepts" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "rendering.lock"):
            if not (folder / SETTINGS_FILE).exists():
                seed = [character.name for character in HELD_OUT_CHARACTERS].index(name)
                render_concept(folder, name, fetch_sprites(self.adapters.parent / "drawings"), seed)
        return load_concept(folder)

    def settings(self, changes: Mapping[str, Any], group: Sequence[str] = ()) -> TrainingSettings:
        """Return the preset `balanced` of the base with `changes`, on linear layers only: those that every rival can adapt.

        Two of the changes choose the preset: with `linear = false` it is on the layers and at the rank that ship, of whatever
        parametrisation, with `together = true` it is that of the concepts of `group` in one go.
        """
        chosen, ships = dict(changes), preset("balanced", self.base)
        layers = LINEAR if chosen.pop("linear", True) else {"rank": ships.rank, "layers": ships.layers}
        concepts = len(group) if chosen.pop("together", False) else 1
        return preset("balanced", self.base, concepts=concepts, changes={**layers, **chosen})

    def shapes(self, settings: TrainingSettings) -> list[tuple[int, int]]:
        """Return the shapes of the layers that `settings` adapt."""
        return [tuple(layer.weight.shape) for layer in adaptable_layers(self.base, settings.layers).values()]

    def adapter(self, name: str, slot: int, changes: Mapping[str, Any], group: Sequence[str] = ()) -> Adapter:
        """Return the concept `name` trained on band number `slot` with `changes`, from disk where it was trained before.

        Args:
            group: concepts that are trained in one pass, `name` among them, each on the band of its place; none: by itself.

        Raises:
            Postponed: another process is training it.
        """
        settings = self.settings(changes, group)
        slots = dict(zip(group, range(len(group)), strict=True)) or {name: slot}
        bands = [self._band(place, settings) for place in slots.values()]
        key = digest([list(slots), [asdict(band) for band in bands], asdict(settings), self.base.fingerprint])
        paths = {one: self.adapters / f"{one}-{settings.parametrisation}-{key}.safetensors" for one in slots}
        if not all(path.exists() for path in paths.values()):
            self._train(list(slots), bands, settings, list(paths.values()), self.adapters / key)
        return load_adapter(paths[name])

    def _train(
        self, names: Sequence[str], bands: Sequence[Band], settings: TrainingSettings, paths: Sequence[Path], state: Path
    ) -> None:
        state.parent.mkdir(parents=True, exist_ok=True)
        lock, checkpoint = FileLock(state.with_suffix(".lock"), timeout=PATIENCE), state.with_suffix(".checkpoint")
        try:
            with lock:
                if all(path.exists() for path in paths):
                    return
                concepts = [(self.concept(name), band) for name, band in zip(names, bands, strict=True)]
                results = train_together(self.base, concepts, settings, checkpoint=checkpoint)
                for path, result in zip(paths, results, strict=True):
                    save_adapter(result.adapter, path)
                checkpoint.unlink(missing_ok=True)
        except Timeout as error:
            raise Postponed(f"{', '.join(names)} are in training elsewhere") from error

    def _band(self, place: int, settings: TrainingSettings) -> Band:
        """Return the band of the concept that gets its own after `place` others."""
        if settings.parametrisation not in BANDED:
            return Band(start=0, rank=settings.rank)
        directions = fewest_directions(self.base, settings.layers)
        return list(bands_in_order(settings.rank, directions, weakest_first=settings.weakest_first))[place]

    def draw(self, adapter: Adapter, token: str, per_prompt: int) -> list[Picture]:
        """Draw the fixed prompts with the whole adapter attached, the same seeds for every adapter."""
        pictures: list[Picture] = []
        for number, prompt in enumerate(PROMPTS):
            drawing = Drawing(prompt=prompt.format(token), count=per_prompt, seed=1000 * number)
            pictures += generate(self.base, drawing, adapter, whole=True)
        return pictures

    def likeness(self, name: str, pictures: list[Picture]) -> Likeness:
        """Return how much `pictures` show the concept `name`, and their prompts."""
        concept, images = self.concept(name), [picture.image for picture in pictures]
        prompts = [picture.drawing.prompt.replace(concept.token, concept.class_word) for picture in pictures]
        references = [example.photo.image for example in concept.examples]
        firsts = [sightings[0].character for sightings in self.judge.look(images)]
        return Likeness(
            identity=sum(first == name for first in firsts) / len(firsts),
            clip_image=_mean(self.scorer.image_alignment(images, references)),
            clip_text=_mean(self.scorer.text_alignment(images, prompts)),
        )

    def lost(self, fused: Adapter, adapters: Sequence[Adapter]) -> list[float]:
        """Return what `fused` loses of each of `adapters`, one concept each; see `lost.lost`."""
        return [lost(self.base, fused, self._own(adapter)) for adapter in adapters]

    def _own(self, adapter: Adapter) -> Own:
        (part,) = adapter.concepts
        key = digest([part.token, part.settings, asdict(part.band) if part.band else None])
        if key not in self.owns:
            self.owns[key] = own_predictions(self.base, adapter, PROMPTS)
        return self.owns[key]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
