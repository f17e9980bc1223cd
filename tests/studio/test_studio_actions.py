"""What the studio can do, without a browser: adapters, pictures, scores and files out."""

from __future__ import annotations

import csv
import io
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from studios import QUICK, concept_of, work

from app.actions.adapters import (
    adapter_cards,
    adapter_path,
    export,
    fuse,
    library_class_words,
    map_bands,
    needs_settling,
    report,
    report_file,
)
from app.actions.concepts import add_samples, concept_card, concept_cards, create_concept
from app.actions.photos import set_caption
from app.actions.pictures import compare, drawing_from, forming, generate, likeness_of, parse_size, picture_cards
from app.actions.regions import added, boxed, formed, moved, named, removed, suggested
from app.actions.studio import Studio, open_studio
from app.actions.tour import queue_tour
from app.actions.trainings import (
    base_facts,
    changes_from,
    expectations,
    further_settings,
    look_at_base,
    train,
    train_again,
    training_view,
)
from app.jobs import State, WorkerProcess
from app.jobs.worker import TaskContext
from spectral_diffusion.adapters.adapter_file import load_adapter
from spectral_diffusion.errors import InputError
from spectral_diffusion.generation.drawing import Drawing
from spectral_diffusion.generation.picture_file import read_drawing
from spectral_diffusion.reports.axis import Axis
from spectral_diffusion.training import TrainingSettings


def test_regions_are_changed_one_step_at_a_time_and_reach_the_picture(tiny_studio: Studio, photo_folder: Path) -> None:
    with pytest.raises(InputError, match="names no concept"):
        suggested(tiny_studio, None, "a dog")
    regions = named(moved(added(added((), "a lake"), ""), 1, "0, 0.5, 0.5,1"), 1, " a cat ")
    assert [(region.prompt, region.box) for region in regions] == [
        ("a lake", (0.25, 0.25, 0.75, 0.75)),
        ("a cat", (0.0, 0.5, 0.5, 1.0)),
    ]
    for change, sentence in (
        (lambda: moved(regions, 0, "0,0,2,1"), "leaves the picture"),
        (lambda: moved(regions, 0, "left"), "is not of the form"),
        (lambda: named(regions, 0, " "), "has no prompt"),
        (lambda: removed(regions, 7), "no region 8"),
    ):
        with pytest.raises(InputError, match=sentence):
            change()
    form = Image.new("L", (256, 256))
    form.paste(255, (64, 64, 128, 128))
    regions = formed(regions, 1, form)
    assert regions[1].box == pytest.approx((0.21, 0.21, 0.54, 0.54)) and boxed(regions, 1)[1].mask is None
    carried = moved(regions, 1, "0.46,0.46,0.79,0.79")[1].mask
    assert carried.point(lambda value: 255 if value > 127 else 0).getbbox() == pytest.approx((128, 128, 192, 192), abs=2)
    with pytest.raises(InputError, match="Nothing was painted for the region of 'a lake'"):
        formed(regions, 0, Image.new("L", (256, 256)))
    seen = []
    report = TaskContext.report

    def look(context: TaskContext, **event: object) -> None:
        report(context, **event)
        if "stage" not in event:
            seen.append(forming(tiny_studio))

    drawing = drawing_from({"prompt": "a lake", "steps": 4, "seed": 3, "regions": removed(regions, 0)})
    generate(tiny_studio, None, drawing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskContext, "report", look)
        assert work(tiny_studio) == [State.DONE], tiny_studio.jobs.jobs()[0].reason
    assert [now[1] if now else None for now in seen] == [3, 3, 3, 3] and forming(tiny_studio) is None
    assert all(now and Image.open(io.BytesIO(now[0])).format == "WEBP" for now in seen)
    (card,) = picture_cards(tiny_studio)
    assert read_drawing(card.path).regions == drawing.regions
    assert not list(tiny_studio.folder("pictures").glob("*.webp"))


def test_every_setting_of_a_training_can_be_given_as_text() -> None:
    assert {*further_settings(), "steps", "sample_every", "checkpoint_every"} == {f.name for f in fields(TrainingSettings)}
    written = {"rank": " 4 ", "unet_rate": "1e-3", "layerwise_token": "Yes", "layers": "to_q, to_k", "seed": ""}
    wanted = {"rank": 4, "unet_rate": 1e-3, "layerwise_token": True, "layers": ("to_q", "to_k")}
    assert changes_from(written) == wanted
    for name, text, sentence in (
        ("rank", "4.5", "rank must be a whole number, got '4.5'; leave it empty"),
        ("mixing", "much", "mixing must be a number, got 'much'"),
        ("layerwise_token", "1", "layerwise_token must be yes or no, got '1'"),
        ("mixing", "2", "mixing must be from 0 to 1"),
    ):
        with pytest.raises(InputError, match=sentence):
            changes_from({name: text})


def test_from_photos_to_a_file_that_diffusers_loads(tiny_studio: Studio, photo_folder: Path, tmp_path: Path) -> None:
    studio = tiny_studio
    look_at_base(studio)
    assert look_at_base(studio) is None
    names = [concept_of(studio, token, photo_folder) for token in ("<one>", "<two>")]
    for name in names:
        train(studio, name, changes=QUICK | {"sample_every": 2} | changes_from({"layers": "to_q to_v", "layerwise_token": "yes"}))
    with pytest.raises(InputError, match="<one> is queued already"):
        train(studio, names[0])
    assert work(studio) == [State.DONE] * 3, [job.reason for job in studio.jobs.jobs()]
    assert (base_facts(studio) or {})["resolution"] == 32 and expectations(studio)["fast"].seconds > 0
    with pytest.raises(InputError, match="The token 'Dog' is already a word of the base"):
        create_concept(studio, "Dog", "dog")
    view = training_view(studio, concept_card(studio, names[0]).job, names[0])
    assert (view.step, view.steps, len(view.losses), len(view.samples)) == (2, 2, 2, 2)
    cards = adapter_cards(studio)
    assert [card.bands for card in cards] == [("46-47",), ("44-45",)]
    adapters = [card.name for card in cards]
    assert map_bands(studio, adapters).conflicts == () and map_bands(studio, adapters).cross_talk[0][1] is not None
    assert map_bands(studio, adapters) is map_bands(studio, adapters)  # an open page asks once a second
    adapter_path(studio, adapters[1]).touch()
    assert map_bands(studio, adapters, [1.0, 0.0]).cross_talk[0][1] == 0.0

    assert needs_settling(studio, adapters) and not needs_settling(studio, adapters[:1])
    both = drawing_from({"prompt": "<one> and <two>", "count": 2, "steps": 1, "seed": 7})
    with pytest.raises(InputError, match="The chosen adapter has no <two>; fuse <one> and <two> first"):
        generate(studio, adapters[0], both)
    with pytest.raises(InputError, match="No concept here is called <onee>; the chosen adapter has <one>"):
        generate(studio, adapters[0], drawing_from({"prompt": "<one> beside <onee>"}))
    fuse(studio, adapters, [1.0, 0.5], title="My pair!", settle=2)
    work(studio)
    pair = next(card for card in adapter_cards(studio) if card.name.startswith("fused/"))
    assert pair.name == "fused/My_pair.safetensors" and list(library_class_words(studio, pair.name)) == ["<one>", "<two>"]
    assert load_adapter(pair.path).weights == (1.0, 0.5) and pair.method == "sum"
    assert not needs_settling(studio, [pair.name, adapters[0]])  # one is fused already
    (job,) = (job for job in studio.jobs.jobs() if job.kind == "fuse")
    steps = [event["step"] for event in studio.jobs.progress(job.name) if "step" in event]
    assert steps == [1, 2] and not list(studio.jobs.folder.glob("*/*.checkpoint"))
    with pytest.raises(InputError, match="'My_pair' already"):
        fuse(studio, adapters, [1.0, 1.0], title="My pair!")

    with pytest.raises(InputError, match=r"has no <one>; choose 'My_pair \(<one> \+ <two>\)'"):
        generate(studio, adapters[1], both)
    generate(studio, pair.name, both)
    axes = Axis.parse("seed", ["1", "2"]), Axis.parse("adapter", ["My_pair", "none"])
    compare(studio, [pair.name], Drawing(prompt="<one> near a lake", steps=1), *axes)
    export(studio, pair.name)
    assert set(work(studio)) == {State.DONE}, [job.reason for job in studio.jobs.jobs()]
    pictures = picture_cards(studio, "likeness")
    assert {card.seed for card in pictures} == {7, 8}
    assert all(card.clip_text is not None and set(card.clip_image) == {"<one>", "<two>"} for card in pictures)
    assert likeness_of(studio, ["<one>", "<three>"]).keys() == {"<one>"}
    exported, compared = studio.jobs.jobs()[0].result, studio.jobs.jobs()[1].result
    with open(studio.file("comparisons", compared["table"]), encoding="utf-8") as table:
        assert len(list(csv.reader(table))) == 5
    assert studio.file("comparisons", compared["sheet"]).is_file()
    with zipfile.ZipFile(studio.file("exports", exported["file"])) as archive:
        archive.extractall(tmp_path / "unpacked")
    files = sorted(path.name for path in (tmp_path / "unpacked").iterdir())
    lora = ["My_pair-lora.json", "My_pair-lora.png", "My_pair-lora.safetensors"]
    assert files == sorted([*lora, "one.safetensors", "two.safetensors", "where-to-put-it.txt"])
    assert exported["error"] < 1e-2 and exported["rank"] == 8

    export(studio, pair.name, "fp32", format="diffusers", rank=1)
    export(studio, pair.name, format="embedding")
    export(studio, pair.name, format="checkpoint")
    train_again(studio, names[0], longer=True)
    assert set(work(studio)) == {State.DONE}, [job.reason for job in studio.jobs.jobs()]
    again, checkpoint, embedding, small = (job.result for job in studio.jobs.jobs()[:4])
    assert again["steps"] == 2 and again["bands"] == {names[0]: "46-47"}
    assert "merged" not in checkpoint["names"] and checkpoint["bytes"] > 2 * embedding["bytes"]
    assert embedding["names"] == ["one.safetensors", "two.safetensors", "where-to-put-it.txt"] and embedding["rank"] is None
    assert small["rank"] == 1 and 0 < small["rank_errors"]["overall"] < 1


def test_a_stopped_training_keeps_its_band_and_ends_as_an_undisturbed_one(
    tiny_studio: Studio, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = tiny_studio
    first, second = (concept_of(studio, token, photo_folder) for token in ("<one>", "<two>"))
    stopped = train(studio, first, changes=QUICK)
    reported = TaskContext.report

    def report_and_cancel(context: TaskContext, **event: object) -> None:
        reported(context, **event)
        if "step" in event:
            studio.jobs.cancel(stopped)

    with monkeypatch.context() as patch:
        patch.setattr(TaskContext, "report", report_and_cancel)
        assert work(studio) == [State.CANCELLED]
    assert (studio.folder("adapters") / f"{first}.safetensors.checkpoint").is_file()
    train(studio, second, changes=QUICK)
    work(studio)
    studio.jobs.resume(stopped)
    assert work(studio) == [State.DONE, State.DONE]
    assert "goes on from step 1" in studio.jobs.log(stopped)
    resumed = load_adapter(studio.folder("adapters") / f"{first}.safetensors").concepts[0]
    assert (resumed.band.start, load_adapter(studio.folder("adapters") / f"{second}.safetensors").concepts[0].band.start) == (
        30,
        28,
    )
    assert resumed.settings["among"] == []  # the second one was not there when it began
    adapter_path(studio, f"adapters/{second}.safetensors").unlink()
    undisturbed = train(studio, first, changes=QUICK)
    work(studio)
    assert studio.jobs.job(undisturbed).state is State.DONE
    again = load_adapter(studio.folder("adapters") / f"{first}.safetensors").concepts[0]
    assert all(
        torch.equal(tensor, again.layers[key].tensors[name])
        for key, part in resumed.layers.items()
        for name, tensor in part.tensors.items()
    )


def test_concepts_are_trained_in_one_go_and_longer(tiny_studio: Studio, photo_folder: Path) -> None:
    studio = tiny_studio
    names = [concept_of(studio, token, photo_folder) for token in ("<one>", "<two>", "<three>")]
    train(studio, names[2], changes=QUICK)
    assert work(studio) == [State.DONE]
    job = train(studio, names[0], changes=QUICK | {"sample_every": 2}, beside=names[:2])
    with pytest.raises(InputError, match="<two> is queued already"):
        train(studio, names[1])
    assert work(studio) == [State.DONE] * 2, studio.jobs.job(job).reason
    assert studio.jobs.job(job).result["bands"] == {names[0]: "28-29", names[1]: "26-27"}
    views = [training_view(studio, studio.jobs.job(job), name) for name in names[:2]]
    assert [len(view.samples) for view in views] == [2, 2] and views[0].samples != views[1].samples
    among = [load_adapter(card.path).concepts[0].settings["among"] for card in adapter_cards(studio)]
    assert among == [["<three>", "<two>"], [], ["<three>", "<one>"]]  # by name: one, three, two
    fuse(studio, [f"adapters/{name}.safetensors" for name in names[:2]], [1.0, 1.0], title="pair", report=True)
    longer = train_again(studio, names[1], longer=True)
    work(studio)
    pair = next(card for card in adapter_cards(studio) if card.name.startswith("fused/"))
    assert pair.method == "sum"
    (job,) = (job for job in studio.jobs.jobs() if job.kind == "report")
    assert job.state is State.DONE and len(job.result["verdicts"]) == 2, job.reason
    assert (page := report_file(studio, pair)) is not None and "&lt;one&gt;" in page.read_text(encoding="utf-8")
    assert {"done": 24, "total": 24} in studio.jobs.progress(job.name)
    os.utime(pair.path)  # as when another adapter is fused under the name
    assert report_file(studio, pair) is None
    report(studio, pair.name)
    with pytest.raises(InputError, match="'pair' is already under way"):
        report(studio, pair.name)
    with pytest.raises(InputError, match=r"There is no 'x\.safetensors'"):
        report(studio, "fused/x.safetensors")
    assert studio.jobs.job(longer).arguments["concepts"] == [names[1], names[0]]
    result = studio.jobs.job(longer).result
    assert (result["steps"], result["bands"]) == (2, {names[0]: "28-29", names[1]: "26-27"})
    steps = [load_adapter(card.path).concepts[0].settings["steps_done"] for card in adapter_cards(studio)[:3]]
    assert steps == [4, 2, 4]


def test_those_never_drawn_with_it_neither_stand_by_nor_keep_their_bands(tiny_studio: Studio, photo_folder: Path) -> None:
    studio = tiny_studio
    first, second, third = (concept_of(studio, token, photo_folder) for token in ("<one>", "<two>", "<three>"))
    for name in (first, second):
        train(studio, name, changes=QUICK)
    assert work(studio) == [State.DONE] * 2
    never = [f"adapters/{second}.safetensors"]
    job = train(studio, third, changes=QUICK, apart_from=never)
    assert work(studio)[-1] is State.DONE, studio.jobs.job(job).reason
    longer = train_again(studio, third, longer=True)
    assert work(studio)[-1] is State.DONE, studio.jobs.job(longer).reason
    made = [load_adapter(adapter_path(studio, f"adapters/{name}.safetensors")).concepts[0] for name in (second, third)]
    assert made[1].band == made[0].band and made[1].settings["among"] == ["<one>"]
    assert "cannot be summed" not in studio.jobs.log(longer) and studio.jobs.job(longer).arguments["apart_from"] == never
    anew = train_again(studio, third)
    assert work(studio)[-1] is State.DONE, studio.jobs.job(anew).reason
    assert not load_adapter(adapter_path(studio, f"adapters/{third}.safetensors")).concepts[0].band.overlaps(made[0].band)
    with pytest.raises(InputError, match="<two> cannot be trained and be one that is never drawn with it"):
        train(studio, third, beside=[second], apart_from=never)
    with pytest.raises(InputError, match=r"There is no 'x\.safetensors'"):
        train(studio, third, apart_from=["adapters/x.safetensors"])


def test_a_training_of_an_older_queue_is_nobodys(studio: Studio) -> None:
    add_samples(studio)
    studio.jobs.submit("train", "Train <poodle>", {"concept": "poodle", "preset": "fast", "changes": {}, "settings": {}})
    assert [card.job for card in concept_cards(studio)] == [None] * 3


def test_failed_jobs_say_why_in_a_sentence(tiny_studio: Studio, photo_folder: Path) -> None:
    studio = tiny_studio
    name = concept_of(studio, "dog", photo_folder)
    train(studio, name, changes=QUICK)
    queue = [studio.jobs.submit("fuse", "x", {"adapters": ["fused/../../x"], "strengths": [], "method": "sum", "out": "x"})]
    assert work(studio) == [State.FAILED, State.FAILED]
    assert "already a word of the base" in (studio.jobs.jobs()[1].reason or "")
    assert "There is no '../../x'" in (studio.jobs.job(queue[0]).reason or "")


def test_the_tour_is_queued_once_the_samples_are_there(studio: Studio) -> None:
    with pytest.raises(InputError, match="'poodle' was removed"):
        queue_tour(studio)
    add_samples(studio)
    jobs = [studio.jobs.job(name) for name in queue_tour(studio)]
    assert [job.kind for job in jobs] == ["train", "fuse", "generate", "export"]
    assert len(queue_tour(studio)) == 3


def test_what_a_killed_process_left_half_written_is_passed_over_and_cleared(tiny_studio: Studio, photo_folder: Path) -> None:
    left = tiny_studio.folder("adapters") / ".writing-ab12.safetensors"
    left.touch()
    train(tiny_studio, concept_of(tiny_studio, "<dog>", photo_folder), changes=QUICK)
    assert work(tiny_studio) == [State.DONE] and left.exists()
    os.utime(left, (0, 0))
    open_studio(tiny_studio.root)
    assert not left.exists()


def test_what_makes_no_sense_is_refused(studio: Studio) -> None:
    assert drawing_from({"prompt": "x", "seed": -1}).seed != drawing_from({"prompt": "x", "seed": -1}).seed
    assert parse_size("512 x 768") == (512, 768) and parse_size(" ") is None
    with pytest.raises(InputError, match="is not a size"):
        parse_size("large")
    with pytest.raises(InputError, match="too many"):
        drawing_from({"prompt": "x", "count": 65})
    with pytest.raises(InputError, match="at least two"):
        fuse(studio, ["adapters/a.safetensors"], [1.0])
    with pytest.raises(InputError, match="no adapter '/etc/passwd'"):
        export(studio, "/etc/passwd")
    with pytest.raises(InputError, match="no precision"):
        export(studio, "adapters/x.safetensors", "fp8")
    with pytest.raises(InputError, match="no format"):
        export(studio, "adapters/x.safetensors", format="zip")
    with pytest.raises(InputError, match="for LoRAs only"):
        export(studio, "adapters/x.safetensors", format="checkpoint", rank=4)
    with pytest.raises(InputError, match="There is no"):
        studio.file("exports", "../settings.json")
    add_samples(studio)
    for prompt, sentence in (
        ("<poodle> near a lake", "The bare base has no <poodle>; train that first, in the tab Concepts"),
        ("<podle> near a lake", "No concept here is called <podle>; the bare base has none"),
    ):
        with pytest.raises(InputError, match=sentence):
            generate(studio, None, drawing_from({"prompt": prompt}))
    name = create_concept(studio, "<none>", "dog")
    with pytest.raises(InputError, match="has no photos"):
        train(studio, name)
    with pytest.raises(InputError, match="There is no concept"):
        train(studio, "../poodle")


def test_actions_answer_at_once_while_a_training_runs(tiny_studio: Studio, photo_folder: Path) -> None:
    studio, patience = tiny_studio, time.monotonic() + 120
    add_samples(studio)
    name = concept_of(studio, "<one>", photo_folder)
    job = train(studio, name, changes=QUICK | {"steps": 100_000})
    actions = {
        "cards": lambda: concept_cards(studio),
        "training": lambda: training_view(studio, studio.jobs.job(job), name),
        "jobs": lambda: (studio.jobs.jobs(), studio.jobs.waiting()),
        "expectations": lambda: expectations(studio),
        "adapters": lambda: adapter_cards(studio),
        "pictures": lambda: (picture_cards(studio), likeness_of(studio, ["<one>"]), forming(studio)),
        "caption": lambda: set_caption(studio, name, "0.png", "<TOK> on a sofa"),
        "draw": lambda: generate(studio, None, drawing_from({"prompt": "a dog"})),
        "train": lambda: train(studio, "poodle") and studio.jobs.empty(),
    }
    with WorkerProcess(studio.folder("jobs"), "app.actions.tasks:TASKS"):
        while training_view(studio, studio.jobs.job(job), name).step < 3:
            assert time.monotonic() < patience and not studio.jobs.job(job).state.ended, studio.jobs.log(job)
            time.sleep(0.1)
        seconds = {what: min(_seconds(action) for _ in range(5)) for what, action in actions.items()}
        assert studio.jobs.job(job).state is State.RUNNING
        assert max(seconds.values()) < 0.3, seconds
        studio.jobs.cancel(job)


def _seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start
