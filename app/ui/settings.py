"""The tab Settings: base, what it predicts, device, CLIP, folders, memory."""

from __future__ import annotations

from typing import Any

import gradio as gr
import psutil

from app.actions.studio import Studio, devices
from app.actions.trainings import base_facts, look_at_base, unknown_base
from app.ui import markup
from app.ui.live import EVENT, Live, attempt

_PREDICTIONS = {"epsilon": "noise (epsilon)", "v_prediction": "velocity (v_prediction)"}


def build_settings(studio: Studio, live: Live) -> None:
    """Build the tab."""
    base = gr.Textbox(
        "", label="Base", placeholder="the embedded toy world", elem_id="base",
        info="A diffusers folder or checkpoint file on this computer, or a hub id, of the Stable Diffusion family. "
        "Empty: the embedded base.",
    )  # fmt: skip
    predicts = gr.Dropdown(
        [("what its files say", ""), *((words, name) for name, words in _PREDICTIONS.items())], value="",
        label="The base predicts", info="SD 2 files often do not say; a wrong one draws noise.", elem_id="predicts",
    )  # fmt: skip
    device = gr.Dropdown([("the best there is", ""), *((name, name) for name in devices())], value="", label="Device")
    clip = gr.Textbox(
        "", label="CLIP for the scores", placeholder="the embedded one (toy world only)",
        info="A folder in open_clip’s form, or NAME:WEIGHTS such as ViT-B-32:weights.safetensors.",
    )  # fmt: skip
    live.begin(base, lambda: studio.settings.base or "")
    live.begin(predicts, lambda: studio.settings.prediction_type or "")
    live.begin(device, lambda: studio.settings.device or "")
    live.begin(clip, lambda: studio.settings.clip or "")
    keep = gr.Button("Keep", variant="primary", elem_id="keep-settings")
    live.add(gr.HTML(elem_id="facts"), lambda: _facts(studio))

    def change(new_base: str, predicted: str, new_device: str, new_clip: str) -> None:
        settings = {"base": new_base, "prediction_type": predicted or "", "device": new_device or "", "clip": new_clip}
        changed = attempt(studio.change_settings, **settings, done="Kept.")
        if changed is not None:
            look_at_base(studio)

    keep.click(change, [base, predicts, device, clip], **EVENT)


def _facts(studio: Studio) -> str:
    facts = base_facts(studio)
    if facts is None:
        base = [["the base", unknown_base(studio)]]
    else:
        base = [
            ["the base", f"family {facts['family']}, pictures of {facts['resolution']} pixels, on {facts['device']}"],
            ["it predicts", _PREDICTIONS.get(facts["predicts"], facts["predicts"])],
            ["precision", _precision(facts)],
            [
                "room",
                f"{facts['directions'] // facts['rank']} concepts of rank {facts['rank']} ({facts['directions']} directions)",
            ],
        ]
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(studio.root))
    rows = [
        *base,
        ["folder", f"{studio.root}, {disk.free / 1e9:.0f} GB free"],
        ["memory", f"{memory.percent:.0f} % of {memory.total / 1e9:.0f} GB in use"],
    ]
    if facts is not None and facts.get("memory"):
        rows.append(["training", f"took {facts['memory'] / 1e9:.1f} GB"])
    return markup.table(["what", "now"], rows)


def _precision(facts: dict[str, Any]) -> str:
    mixed = "" if facts["device"] == "cpu" else ", bfloat16 while training"
    return f"{facts.get('precision', 'float32')}{mixed}"
