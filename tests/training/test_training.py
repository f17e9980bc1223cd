"""Training on a tiny base: what moves, what stays, and that nothing is lost when it is stopped."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from random_adapters import FORMS, band_of, random_adapter
from shared_bases import BASES, shared_base
from short_trainings import BAND, SHORT, assert_bit_equal, first_step, prepare_less, trained_tensors
from torch import nn

from spectral_diffusion.adapters.adapter import Adapter, input_group
from spectral_diffusion.adapters.attach import attached
from spectral_diffusion.bases.base import Base, adaptable_layers, load_base
from spectral_diffusion.concepts.concept import Concept, Example, load_concept
from spectral_diffusion.concepts.photos import Photo
from spectral_diffusion.errors import AdapterError, BandError, InputError, TrainingError
from spectral_diffusion.spectra.bands import Band, bands_in_order
from spectral_diffusion.spectra.spectrum import base_spectrum
from spectral_diffusion.training import TrainingProgress, measure_pace, train
from spectral_diffusion.training.activations import PROMPTS, measure_activations
from spectral_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from spectral_diffusion.training.examples import EncodedExamples, encode_examples, random_crop
from spectral_diffusion.training.inertness import stranger_vectors
from spectral_diffusion.training.trainable import class_word_vectors, first_vectors

pytestmark = pytest.mark.usefixtures("less_preparation")


@pytest.fixture(scope="module")
def undisturbed(base: Base, concept: Concept) -> Adapter:
    """What `SHORT` ends with."""
    torch.manual_seed(1)
    return train(base, concept, BAND, SHORT).adapter


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", BASES)
def test_only_the_adapter_and_the_token_move(which: str, form: str, concept: Concept, tiny_base_folder: Path) -> None:
    base = shared_base(which, tiny_base_folder)
    models = (base.pipeline.unet, base.pipeline.text_encoder, base.pipeline.vae)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    random_state = torch.get_rng_state()
    adapter = train(base, concept, BAND, replace(SHORT, parametrisation=form, steps=1)).adapter
    for model, kept in zip(models, before, strict=True):
        state = model.state_dict()
        assert state.keys() == kept.keys() and all(torch.equal(state[name], kept[name]) for name in kept)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.count_nonzero(tensor) for tensor in trained_tensors(adapter).values())
    assert not torch.equal(adapter.concepts[0].embeddings["text_encoder"], class_word_vectors(base, "dog")["text_encoder"])
    spectra = base_spectrum(base, adaptable_layers(base))
    assert spectra.keys() == adapter.concepts[0].layers.keys()
    for key, part in adapter.concepts[0].layers.items():
        own = band_of(spectra[key], BAND.start, BAND.rank)
        assert torch.equal(part.band.U, own.U) and torch.equal(part.band.s, own.s) and torch.equal(part.band.V, own.V)


def test_a_trained_concept_leaves_the_other_leading_bands_alone(base: Base, undisturbed: Adapter) -> None:
    for key, spectrum in base_spectrum(base, adaptable_layers(base)).items():
        others = [column for column in range(8) if not BAND.start <= column < BAND.stop]
        change = undisturbed.delta(key).dense()
        written, read = spectrum.U[:, others].T @ change, change @ spectrum.V[:, others]
        assert change.norm() > 0
        # float32 round-off of a projection; without confinement it is about 0.3
        assert max(written.norm(), read.norm()) / change.norm() < 1e-5


def test_a_concept_on_weak_directions_leaves_the_other_weak_bands_alone(base: Base, concept: Concept) -> None:
    spectra = base_spectrum(base, adaptable_layers(base))
    fewest = min(len(spectrum.s) for spectrum in spectra.values())
    (last, before, *_) = bands_in_order(SHORT.rank, fewest, weakest_first=True)
    adapter = train(base, concept, before, replace(SHORT, weakest_first=True, isolation=2)).adapter
    for key, spectrum in spectra.items():
        change, others = adapter.delta(key).dense(), slice(last.start, last.stop)
        written, read = spectrum.U[:, others].T @ change, change @ spectrum.V[:, others]
        # float32 round-off of a projection
        assert max(written.norm(), read.norm()) / change.norm() < 1e-5 < (spectrum.U[:, :2].T @ change).norm() / change.norm()


def test_the_rates_of_the_parts_are_their_own(base: Base, concept: Concept) -> None:
    frozen = replace(SHORT, steps=1, text_encoder_rate=0.0, token_rate=0.0)
    (part,) = train(base, concept, BAND, frozen).adapter.concepts
    assert torch.equal(part.embeddings["text_encoder"], class_word_vectors(base, "dog")["text_encoder"])
    for key, layer in part.layers.items():
        moved = any(torch.count_nonzero(tensor) for tensor in layer.tensors.values())
        assert moved == key.startswith("unet.")


def test_the_chosen_layers_are_adapted_whichever_they_are(base: Base, concept: Concept) -> None:
    settings = replace(SHORT, steps=1, layers=("to_v", "net.2", "mlp.fc1", "0.conv1", "upsamplers.0.conv"))
    adapter = train(base, concept, BAND, settings).adapter
    endings = {key.rpartition("_")[2] if key.endswith("to_v") else ".".join(key.split(".")[-2:]) for key in adapter.layer_keys()}
    assert endings == {"v", "net.2", "mlp.fc1", "0.conv1", "0.conv"}
    assert adapter.concepts[0].activations.keys() == {input_group(key) for key in adapter.layer_keys() if ".0.conv" not in key}
    assert all(adapter.delta(key).dense().norm() > 0 for key in adapter.layer_keys())
    with attached(base, adapter):
        pass
    with pytest.raises(InputError, match=r"No layer of .* ends in to_x; choose others"):
        train(base, concept, BAND, replace(SHORT, layers=("to_x",)))


def test_several_vectors_stand_for_one_token(base: Base, concept: Concept) -> None:
    adapter = train(base, concept, BAND, replace(SHORT, steps=1, token_vectors=3)).adapter
    word = class_word_vectors(base, "dog")
    start, other = (
        first_vectors(base, token, word, replace(SHORT, token_vectors=3))["text_encoder"] for token in ("<V1>", "<V2>")
    )
    assert torch.equal(start[2:], word["text_encoder"]) and torch.equal(other[2:], start[2:])
    assert all((one - another).norm() > 0.1 for one, another in combinations([*start, *other[:2]], 2))
    moved = (adapter.concepts[0].embeddings["text_encoder"] - start).abs().sum(1)
    assert moved.shape == (3,) and (0 < moved).all() and (moved < 1).all()


def test_tokens_begin_apart_and_strangers_stand_where_tokens_do(base: Base, concept: Concept) -> None:
    word, settings = class_word_vectors(base, "dog"), replace(SHORT, token_distance=1.5)
    norm = word["text_encoder"].norm()
    begun = [first_vectors(base, token, word, settings)["text_encoder"] for token in ("<V1>", "<V2>")]
    for vector in begun:
        torch.testing.assert_close((vector - word["text_encoder"]).norm(), 1.5 * norm)
    assert (begun[0] - begun[1]).norm() > norm
    strangers = [own["text_encoder"] for own in stranger_vectors(base, "dog", 1.5, seed=0).values()]
    distances = torch.stack([(own - word["text_encoder"]).norm() for own in strangers[::2]])
    torch.testing.assert_close(distances, (1.5 * norm).expand(len(distances)))
    assert all((one - other).norm() > norm / 2 for one, other in combinations([*strangers, *begun], 2))
    frozen = train(base, concept, BAND, replace(settings, token_rate=0.0)).adapter.concepts[0].embeddings["text_encoder"]
    assert torch.equal(frozen, first_vectors(base, concept.token, word, settings)["text_encoder"])


def test_progress_is_told_after_every_step(base: Base, concept: Concept) -> None:
    events: list[TrainingProgress] = []
    train(base, concept, BAND, replace(SHORT, steps=3, sample_every=2), on_progress=events.append)
    assert [(event.step, event.steps) for event in events] == [(1, 3), (2, 3), (3, 3)]
    assert all(math.isfinite(event.concept_loss) and event.concept_loss > 0 for event in events)
    assert all(event.steps_per_second > 0 for event in events)
    assert events[0].remaining_seconds > 0 and events[-1].remaining_seconds == 0
    assert [len(event.samples) for event in events] == [0, 2, 0]
    assert {picture.size for picture in events[1].samples} == {(32, 32)}


def test_the_inertness_loss_begins_at_zero_and_can_be_left_out(base: Base, concept: Concept) -> None:
    events: list[TrainingProgress] = []
    train(base, concept, BAND, SHORT, on_progress=events.append)
    # squared float32 round-off of another batch size
    assert events[0].inertness_loss < 1e-10 < 1e-8 < events[-1].inertness_loss
    without = first_step(base, concept, replace(SHORT, inertness=0.0))
    assert without.inertness_loss == 0
    assert without.concept_loss == pytest.approx(events[0].concept_loss, rel=1e-5)


def test_the_loss_outside_the_mask_counts_as_background(base: Base, concept: Concept, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_examples(base, concept, seed=0)
    left = torch.zeros_like(whole.masks)
    left[..., : left.shape[-1] // 2] = 1

    def loss(masks: torch.Tensor, background: float) -> float:
        examples = replace(whole, masks=masks, places=masks)
        module = import_module("spectral_diffusion.training.loop")
        monkeypatch.setattr(module, "encode_examples", lambda *anything: examples)
        return first_step(base, concept, replace(SHORT, background=background)).concept_loss

    inside, outside = loss(left, 0.0), loss(1 - left, 0.0)
    assert inside != pytest.approx(outside, rel=1e-2)
    # means of a few hundred float32 numbers
    assert loss(left, 0.25) == pytest.approx((inside + 0.25 * outside) / 1.25, rel=1e-5)
    assert loss(whole.masks, 0.0) == pytest.approx((inside + outside) / 2, rel=1e-5)
    assert loss(torch.zeros_like(left), 0.0) == 0


class PoolingEncoder:
    """Stands for an autoencoder: the latents are the mean colours of 4 x 4 pixels."""

    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(scaling_factor=1.0)

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=nn.functional.avg_pool2d(pixels, 4)))


def encoded_by_pooling(concept: Concept) -> EncodedExamples:
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=8))
    pipeline = SimpleNamespace(vae=PoolingEncoder(), unet=unet, vae_scale_factor=4)
    base = Base(pipeline=pipeline, family="mini", fingerprint="", source="", embedded=False)
    return encode_examples(base, concept, seed=0)


def test_masks_follow_their_photos_through_crops(concept: Concept) -> None:
    mask = Image.new("L", (96, 64))
    ImageDraw.Draw(mask).ellipse([10, 20, 50, 60], fill=255)
    photo = Photo(**{**vars(concept.examples[0].photo), "image": mask.convert("RGB")})
    example = Example(photo=photo, caption="<TOK> in the snow", mask=mask)
    encoded = encoded_by_pooling(replace(concept, examples=(example,) * 4))
    assert encoded.captions == ("<V1> in the snow",) * 8
    # both are rounded to 255 levels
    torch.testing.assert_close(encoded.latents / 2 + 0.5, encoded.masks.expand(-1, 3, -1, -1), rtol=0, atol=1.01 / 255)
    assert len({crop.numpy().tobytes() for crop in encoded.masks}) > 1


def test_crops_are_taken_around_the_concept_and_never_mirrored() -> None:
    mask = Image.new("L", (300, 200))
    ImageDraw.Draw(mask).rectangle([130, 60, 169, 119], fill=255)  # 40 x 60
    photo = Image.merge("RGB", (mask, Image.linear_gradient("L").rotate(90).resize(mask.size), mask))  # bright to the right
    rng = np.random.default_rng(0)
    middles, edges = [], []
    for _ in range(40):
        crop, cropped = random_crop(photo, mask, 64, rng)
        left, top, right, bottom = cropped.point(lambda value: 255 if value > 127 else 0).getbbox() or (0, 0, 0, 0)
        middles.append(((left + right) / 2 / 64, (top + bottom) / 2 / 64))
        edges.append(60 * 64 / (bottom - top))
        shades = np.array(crop)[..., 1].astype(int).mean(0)
        assert shades[-1] > shades[0] + 10
    assert np.abs(np.array(middles) - 0.5).max() < 0.05  # the shake, and a pixel
    assert 115 < min(edges) < 140 and 160 < max(edges) < 210  # from twice the 60 to the whole 200
    assert random_crop(photo, Image.new("L", photo.size), 64, rng)[0].size == (64, 64)
    corner = Image.new("L", (300, 200))
    ImageDraw.Draw(corner).rectangle([0, 150, 39, 199], fill=255)
    for _ in range(10):  # the photo's edges keep it from the middle, but none of it is cut off
        cropped = random_crop(photo, corner, 64, rng)[1]
        left, top, right, bottom = cropped.point(lambda value: 255 if value > 127 else 0).getbbox() or (9, 9, 9, 9)
        assert left == 0 and bottom == 64 and abs((right - left) / (bottom - top) - 0.8) < 0.1


def test_without_a_mask_every_part_of_a_photo_is_shown() -> None:
    photo = Image.linear_gradient("L").rotate(90).resize((300, 100)).convert("RGB")
    rng = np.random.default_rng(0)
    crops = [np.array(random_crop(photo, Image.new("L", photo.size, 255), 32, rng)[0]) for _ in range(60)]
    assert max(crop.max() for crop in crops) > 240 and min(crop.min() for crop in crops) < 15


def test_a_photo_without_a_mask_counts_everywhere(concept: Concept) -> None:
    assert (encoded_by_pooling(concept).masks == 1).all()


def train_and_die(photos: Path, base: Path, checkpoint: Path) -> None:
    """Train as `undisturbed` does, but for a SIGKILL after the last step."""

    def die_at_the_end(progress: TrainingProgress) -> None:
        if progress.step == SHORT.steps:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare_less(pytest.MonkeyPatch())
    concept = load_concept(photos, token="<V1>", class_word="dog")
    train(load_base(base, device="cpu"), concept, BAND, SHORT, checkpoint=checkpoint, on_progress=die_at_the_end)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_killed_training_ends_with_the_same_adapter(
    base: Base, concept: Concept, photo_folder: Path, tmp_path: Path, undisturbed: Adapter
) -> None:
    arguments = f"Path({str(photo_folder)!r}), Path({base.source!r}), Path({str(tmp_path / 'state')!r})"
    script = f"from pathlib import Path; import test_training; test_training.train_and_die({arguments})"
    command = [sys.executable, "-c", script]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, cwd=Path(__file__).parent, env=paths, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    events: list[TrainingProgress] = []
    result = train(base, concept, BAND, SHORT, checkpoint=tmp_path / "state", on_progress=events.append)
    assert [event.step for event in events] == [5] and result.finished
    assert_bit_equal(result.adapter, undisturbed)


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_training_goes_on_where_it_was(form: str, base: Base, concept: Concept, tmp_path: Path) -> None:
    settings = replace(SHORT, parametrisation=form)
    events: list[TrainingProgress] = []
    stopped = train(
        base, concept, BAND, settings, checkpoint=tmp_path / "state", should_stop=lambda: len(events) == 3,
        on_progress=events.append,
    )  # fmt: skip
    assert (stopped.finished, stopped.steps_done) == (False, 3)
    resumed = train(base, concept, BAND, settings, checkpoint=tmp_path / "state", on_progress=events.append)
    assert [event.step for event in events] == [1, 2, 3, 4, 5] and resumed.finished
    torch.manual_seed(12345)
    assert_bit_equal(resumed.adapter, train(base, concept, BAND, settings).adapter)


def test_a_checkpoint_of_other_captions_is_not_gone_on_from(
    base: Base, concept: Concept, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_step = replace(SHORT, steps=2, checkpoint_every=1)
    train(base, concept, BAND, one_step, checkpoint=tmp_path / "state")
    retold = replace(concept, examples=tuple(replace(one, caption="<TOK> asleep") for one in concept.examples))
    events: list[TrainingProgress] = []
    train(base, retold, BAND, one_step, checkpoint=tmp_path / "state", on_progress=events.append)
    assert events[0].step == 1
    assert "has other photos, settings, neighbours or another base; the training starts anew" in caplog.text


@pytest.mark.parametrize("what", ["prediction", "neighbours"])
def test_a_checkpoint_of_another_prediction_or_of_other_neighbours_is_not_gone_on_from(
    what: str, base: Base, concept: Concept, tmp_path: Path
) -> None:
    one_step = replace(SHORT, steps=2, checkpoint_every=1)
    train(base, concept, BAND, one_step, checkpoint=tmp_path / "state")
    events: list[TrainingProgress] = []
    again = {"checkpoint": tmp_path / "state", "on_progress": events.append}
    if what == "prediction":
        train(load_base(base.source, device="cpu", prediction_type="v_prediction"), concept, BAND, one_step, **again)
    else:
        train(base, concept, BAND, one_step, among=random_adapter(base, token="<V2>", size=0.1), **again)
    assert [event.step for event in events] == [1, 2]


def test_a_training_does_not_go_on_from_another_prediction(base: Base, concept: Concept) -> None:
    adapter = train(base, concept, BAND, replace(SHORT, steps=1)).adapter
    other = load_base(base.source, device="cpu", prediction_type="v_prediction")
    with pytest.raises(AdapterError, match=r"trained where this base predicts epsilon, .* give --prediction-type epsilon"):
        train(other, concept, BAND, SHORT, start=adapter)


def test_one_concept_says_that_it_was_shown_beside_none(base: Base, concept: Concept) -> None:
    adapter = train(base, concept, BAND, replace(SHORT, steps=1, mixing=0.5)).adapter
    assert adapter.concepts[0].settings["mixing"] == 0


@pytest.mark.parametrize("content", [b"", b"nonsense", b"half", b"\x80\x02cos\nsystem\n."])
def test_a_damaged_checkpoint_is_said(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "state"
    save_checkpoint(file, "run", {"step": 3, "token": torch.ones(2)})
    assert load_checkpoint(file, "run")["step"] == 3
    file.write_bytes(file.read_bytes()[:500] if content == b"half" else content)
    assert load_checkpoint(file, "run") is None
    assert "is damaged; the training starts anew" in caplog.text


def test_a_loss_that_is_no_number_keeps_the_last_good_state(base: Base, concept: Concept, tmp_path: Path) -> None:
    exploding = replace(SHORT, unet_rate=1e30, checkpoint_every=1)
    state, tokenizer = tmp_path / "state", base.pipeline.tokenizer
    with pytest.raises(TrainingError, match=r"stopped at step 1: the loss is not a number\. The last good state, of step 0"):
        train(base, concept, BAND, exploding, checkpoint=state)
    (record,) = [torch.load(state, weights_only=True)["state"]]
    assert record["step"] == 0
    assert not any(torch.count_nonzero(t) for name, t in record["trainable"].items() if not name.startswith("token/"))
    assert base.pipeline.tokenizer is tokenizer
    with pytest.raises(TrainingError, match=r"not a number\. Lower the learning rates"):
        train(base, concept, BAND, exploding)


def test_a_band_that_does_not_fit_is_refused(base: Base, concept: Concept) -> None:
    with pytest.raises(BandError, match=r"Band 47-48 lies beyond layer .*, which has 48 .* start at 46 or earlier"):
        train(base, concept, Band(start=47, rank=2), SHORT)
    with pytest.raises(BandError, match=r"Rank 49 is larger than layer .* choose a smaller rank"):
        train(base, concept, Band(start=0, rank=49), replace(SHORT, rank=49))


def test_a_token_that_the_base_knows_is_refused(base: Base, concept: Concept) -> None:
    with pytest.raises(InputError, match="The token 'dog' is already a word of the base"):
        train(base, replace(concept, token="dog"), BAND, SHORT)


def test_a_class_word_of_several_pieces_starts_at_their_mean(base: Base) -> None:
    table = base.pipeline.text_encoder.get_input_embeddings().weight
    ids = base.pipeline.tokenizer("xylophone zebra", add_special_tokens=False).input_ids
    assert len(ids) > 2
    torch.testing.assert_close(
        class_word_vectors(base, "xylophone zebra")["text_encoder"][0], table[ids].mean(0), rtol=0, atol=1e-6
    )


def test_the_pace_is_measured_and_nothing_is_left(base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.pipeline.unet.state_dict().items()}
    asked: list[None] = []
    assert (measure_pace(base, SHORT) or 0) > 0
    assert measure_pace(base, SHORT, lambda: bool(asked.append(None) or len(asked) > 2)) is None and len(asked) == 3
    after = base.pipeline.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.pipeline.unet.modules())


def test_activations_are_those_of_the_layers_while_the_concept_is_drawn(base: Base, undisturbed: Adapter) -> None:
    keys, pipeline = undisturbed.layer_keys(), base.pipeline
    assert undisturbed.concepts[0].activations.keys() == {input_group(key) for key in keys}
    with attached(base, undisturbed), torch.no_grad():
        measured = measure_activations(base, "<V1>", keys, seed=0)
        prompts = [prompt.format("<V1>") for prompt in PROMPTS[:2]]
        ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        states = pipeline.text_encoder(ids, output_hidden_states=True)
        first = pipeline.text_encoder.encoder.layers[0].layer_norm1(states.hidden_states[0])
    expected = {"text": states.last_hidden_state, "text_encoder.encoder.layers.0.self_attn.q_proj": first}
    for group, inputs in expected.items():
        flat = inputs.flatten(0, 1).double()
        gram = flat.T @ flat
        # float32 sums; all 48 eigenvectors are kept
        scaled = gram * (len(gram) / gram.trace())
        assert (measured[group].double() @ measured[group].double().T - scaled).norm() / scaled.norm() < 1e-5
