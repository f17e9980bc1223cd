"""What a command says: data that any program can read, whatever the terminal's encoding."""

from __future__ import annotations

import json

import pytest

from spectral_diffusion.cli.console import Console


def test_data_on_stdout_are_json_in_any_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    Console(json_target="-").give({"token": "<猫>", "class word": "Kätzchen"})
    said = capsys.readouterr().out
    assert said.isascii() and json.loads(said) == {"token": "<猫>", "class word": "Kätzchen"}
