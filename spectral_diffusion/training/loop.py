"""Training: photos of one concept or several in, an adapter each out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from spectral_diffusion.adapters.adapter import Adapter, ConceptPart, token_words
from spectral_diffusion.adapters.attach import Switch, beside, check_fits_base, check_new_tokens, with_tokens
from spectral_diffusion.bases.base import Base, adaptable_layers
from spectral_diffusion.concepts.concept import Concept
from spectral_diffusion.errors import AdapterError, InputError
from spectral_diffusion.parametrisations import BANDED
from spectral_diffusion.prompts.conditioning import tokenize, word_ids
from spectral_diffusion.prompts.tokens import expand_prompt
from spectral_diffusion.spectra.bands import Band
from spectral_diffusion.training.attention import watched_attention
from spectral_diffusion.training.batches import Photos, Pool, Shown, Source
from spectral_diffusion.training.examples import EncodedExamples, encode_examples
from spectral_diffusion.training.inertness import STRANGERS, build_inert_pool, stranger_vectors
from spectral_diffusion.training.memory import lightened
from spectral_diffusion.training.mixing import mixed_examples
from spectral_diffusion.training.run import Run, TrainingProgress
from spectral_diffusion.training.scenes import scene_examples
from spectral_diffusion.training.settings import TrainingSettings
from spectral_diffusion.training.trainable import build_trainable, class_word_vectors, first_vectors

INERT_SAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The trained `adapter`; `finished` is false when the training was stopped before its last step."""

    adapter: Adapter
    steps_done: int
    finished: bool
    seconds: float


def train(
    base: Base,
    concept: Concept,
    band: Band,
    settings: TrainingSettings,
    *,
    among: Adapter | None = None,
    start: Adapter | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train one concept on its band of the base's singular directions: `train_together` with a single one."""
    return train_together(
        base,
        [(concept, band)],
        settings,
        among=among,
        start=[start] if start else (),
        checkpoint=checkpoint,
        on_progress=on_progress,
        should_stop=should_stop,
    )[0]


def train_together(
    base: Base,
    concepts: Sequence[tuple[Concept, Band]],
    settings: TrainingSettings,
    *,
    among: Adapter | None = None,
    start: Sequence[Adapter] = (),
    checkpoint: Path | None = None,
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrainingResult]:
    """Train concepts, each on its band, in one pass of the base per step.

    The base is frozen and shared, so one pass carries the samples of all, each through its own concept's adapter. Token,
    losses, gradient norm and optimiser state are each concept's own. A share of the steps, `settings.presence`, is made among
    the others: then every sample passes through the sum of all concepts, as it will in the fused adapter. Without it each
    concept ends as if it were trained alone.

    Args:
        among: concepts trained before that these will be drawn together with; they stay as they are. In the steps made among
            the others they are attached, and what they give on prompts with their own tokens must stay.
        start: one per concept, an adapter that holds it as it was trained before: `settings.steps` more steps are made from
            there, the rates falling from their full height once more (a warm restart, Loshchilov & Hutter 2017). Where
            there is none, from the class word and no change.
        checkpoint: where the state is kept every `settings.checkpoint_every` steps; a run of the same photos, base and
            settings goes on from it and ends as an undisturbed run does. It stays; remove it once the adapters are saved.
        on_progress: called after every step, on a GPU after every tenth.
        should_stop: asked before every step; when it says true the state is kept and what was trained so far returned.

    Raises:
        InputError: a token is a word of the base or stands for two concepts, or the settings do not fit the base.
        AdapterError: `among` or `start` does not fit the base, or a concept is not in `start` or was trained otherwise there.
        TrainingError: the loss is not a number (the last good state is in `checkpoint`), or memory does not suffice.
    """
    subjects = [Subject(token=concept.token, class_word=concept.class_word, band=band) for concept, band in concepts]
    _check_tokens(base, [subject.token for subject in subjects], among.tokens if among else ())
    examples = [encode_examples(base, concept, settings.seed, settings.caption_dropout) for concept, _ in concepts]
    if settings.scenes:
        scenes = [scene_examples(base, concept, settings.seed) for concept, _ in concepts]
        examples = [own.followed_by(more) if more else own for own, more in zip(examples, scenes, strict=True)]
    if len(concepts) == 1 or not settings.presence:
        settings = replace(settings, mixing=0.0)  # what is kept of a training says what was done
    if settings.mixing:
        beside_others = mixed_examples(base, [concept for concept, _ in concepts], settings.seed)
        examples = [own.followed_by(mixes) for own, mixes in zip(examples, beside_others, strict=True)]

    def photos(written: dict[str, str]) -> list[Source]:
        return [_photos(base, encoded, subject, written) for encoded, subject in zip(examples, subjects, strict=True)]

    return train_subjects(
        base,
        subjects,
        settings,
        photos,
        among=among,
        start=start,
        checkpoint=checkpoint,
        on_progress=on_progress,
        should_stop=should_stop,
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A concept to be trained: what it is called, and its band."""

    token: str
    class_word: str
    band: Band


def train_subjects(
    base: Base,
    subjects: Sequence[Subject],
    settings: TrainingSettings,
    sources: Callable[[dict[str, str]], list[Source]],
    *,
    among: Adapter | None,
    start: Sequence[Adapter],
    checkpoint: Path | None,
    on_progress: Callable[[TrainingProgress], None],
    should_stop: Callable[[], bool],
) -> list[TrainingResult]:
    """Train `subjects` as `train_together` says, on whatever `sources` gives each to learn from.

    Args:
        sources: called with the words that stand for each token, when the base knows the tokens as they begin and has nothing
            attached; returns one source per subject.
    """
    among = among or Adapter(family=base.family, fingerprint=base.fingerprint, concepts=(), weights=())
    class_vectors = [class_word_vectors(base, subject.class_word) for subject in subjects]
    started = [_started(base, subject, settings, adapter) for subject, adapter in zip(subjects, start, strict=bool(start))]
    begun = [first_vectors(base, own.token, vectors, settings) for own, vectors in zip(subjects, class_vectors, strict=True)]
    trainable = build_trainable(base, [own.token for own in subjects], [own.band for own in subjects], begun, settings)
    for number, part in enumerate(started):
        trainable.start(number, part)
    steps_before = [part.settings.get("steps_done", 0) for part in started] or [0] * len(subjects)
    strangers = [
        stranger_vectors(base, own.class_word, settings.token_distance, settings.seed, first=number * STRANGERS)
        for number, own in enumerate(subjects)
    ]
    written = {subject.token: token_words(subject.token, settings.token_vectors) for subject in subjects}
    tokens = {subject.token: own for subject, own in zip(subjects, trainable.embeddings, strict=True)}
    for own in strangers:
        tokens |= own
    others = Switch(on=False)
    with lightened(base), with_tokens(base, tokens | among.embeddings), beside(base, among, switch=others):
        pools = [_pool(base, subject.class_word, tuple(own), settings) for subject, own in zip(subjects, strangers, strict=True)]
        pools_among = pools
        if among.concepts and settings.presence:
            others.on = True
            pools_among = [_pool(base, subject.class_word, among.words, settings) for subject in subjects]
            others.on = False
        shown = [
            Shown(
                token=own.token,
                class_word=own.class_word,
                words=written[own.token],
                ids=word_ids(base, written[own.token]),
                learnt=source,
                pool=pool,
                pool_among=beside,
            )
            for own, source, pool, beside in zip(subjects, sources(written), pools, pools_among, strict=True)
        ]
        neighbours = list(zip(among.concepts, among.weights, strict=True)) if settings.presence else []
        run = Run(base, trainable, settings, shown, neighbours, others, checkpoint)
        watched = watched_attention(base.pipeline.unet) if settings.attention else nullcontext()
        with trainable.adaptation.attached():
            with watched as run.seen:
                run.loop(on_progress, should_stop)
            activations = run.activations()
    trained = [trainable.adaptation.result(number) for number in range(len(subjects))]
    banded, parameters = settings.parametrisation in BANDED, trainable.parameter_count()
    return [
        TrainingResult(
            adapter=Adapter(
                family=base.family,
                fingerprint=base.fingerprint,
                prediction_type=base.prediction_type,
                concepts=(
                    ConceptPart(
                        token=subject.token,
                        class_word=subject.class_word,
                        band=subject.band if banded else None,
                        parametrisation=trained[number].form,
                        embeddings=trainable.token_vectors(number),
                        layers=trained[number].parts,
                        activations=activations[number],
                        settings=asdict(settings)
                        | {
                            "steps_done": steps_before[number] + run.step,
                            "parameters": parameters,
                            "among": _others(subjects, among, subject) if settings.presence else [],
                        },
                    ),
                ),
                weights=(1.0,),
            ),
            steps_done=run.step,
            finished=run.finished,
            seconds=run.seconds,
        )
        for number, subject in enumerate(subjects)
    ]


def _check_tokens(base: Base, tokens: Sequence[str], taken: Sequence[str]) -> None:
    check_new_tokens(base, tokens)
    for number, token in enumerate(tokens):
        if token.lower() in (other.lower() for other in (*taken, *tokens[:number])):
            raise InputError(f"Two concepts use the token '{token}'; give each a token of its own.")


def _started(base: Base, subject: Subject, settings: TrainingSettings, adapter: Adapter) -> ConceptPart:
    """Return what `adapter` holds of `subject` if a training with these settings can go on from it."""
    check_fits_base(base, adapter)
    part = adapter.concept(subject.token)
    if adapter.fingerprint != base.fingerprint:
        raise AdapterError(f"'{subject.token}' was trained on another base, whose directions are others; start it anew.")
    for what, was, wanted in (
        ("parametrisation", part.parametrisation, settings.parametrisation),
        ("directions", part.band, subject.band if part.band else None),
        ("rank", part.rank, settings.rank),
        ("token_vectors", part.token_vectors, settings.token_vectors),
        ("layerwise_token", part.is_layerwise, settings.layerwise_token),
    ):
        if was != wanted:
            raise AdapterError(f"'{subject.token}' was trained with {what} {was}, not {wanted}; choose that, or start it anew.")
    if part.layers.keys() != adaptable_layers(base, settings.layers).keys():
        raise AdapterError(f"'{subject.token}' was trained on other layers; choose those again, or start it anew.")
    return part


def _others(subjects: Sequence[Subject], among: Adapter, own: Subject) -> list[str]:
    """Return the tokens of the concepts that `own` was trained among."""
    return [*among.tokens, *(subject.token for subject in subjects if subject is not own)]


def _photos(base: Base, examples: EncodedExamples, subject: Subject, written: dict[str, str]) -> Photos:
    """Return the photos of `subject` with their captions; its token must be known to the base.

    Args:
        written: the words that stand for each token.
    """
    ids = tokenize(base, [expand_prompt(caption, written) for caption in examples.captions])
    own = word_ids(base, written[subject.token])
    return Photos(examples=examples, ids=ids, tokens=torch.isin(ids[:, 0], own).float())


def _pool(base: Base, class_word: str, strangers: tuple[str, ...], settings: TrainingSettings) -> Pool:
    return build_inert_pool(base, class_word, strangers, INERT_SAMPLES, settings.seed)
