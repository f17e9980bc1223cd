"""Who may reach the studio, and what every request passes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.guard import middleware
from app.server import AUTH_VARIABLE, Doorkeeper, check_access, check_port
from spectral_diffusion.cli import main
from spectral_diffusion.errors import InputError


def test_a_local_studio_needs_no_login_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_access("127.0.0.1", None) is None
    with pytest.raises(InputError, match=r"Others could reach the studio on '0\.0\.0\.0'; give --auth user:password"):
        check_access("0.0.0.0", None)
    monkeypatch.setenv(AUTH_VARIABLE, "ada:from the environment")
    keeper = check_access("0.0.0.0", None)
    assert keeper is not None and keeper("ada", "from the environment")


@pytest.mark.parametrize("auth", ["ada", ":password", "ada:short", ""])
def test_weak_logins_are_refused(auth: str) -> None:
    if auth:
        with pytest.raises(InputError, match="at least 8 characters"):
            check_access("127.0.0.1", auth)
    else:
        with pytest.raises(InputError, match="give --auth"):
            check_access("0.0.0.0", auth)


def test_after_five_wrong_logins_nobody_gets_in_for_a_minute() -> None:
    now = [0.0]
    keeper = Doorkeeper("ada", "correct: horse", lambda: now[0])
    assert keeper("ada", "correct: horse") and not keeper("bob", "correct: horse") and not keeper("ada", "ünknown")
    for _ in range(3):
        assert not keeper("ada", "wrong")
    assert not keeper("ada", "correct: horse")
    now[0] = 61
    assert keeper("ada", "correct: horse")


def test_the_password_may_hold_colons() -> None:
    keeper = check_access("127.0.0.1", "ada:a:b:c:d:e")
    assert keeper is not None and keeper("ada", "a:b:c:d:e")


def test_foreign_hosts_and_addresses_are_refused() -> None:
    routes = [Route("/{path:path}", lambda request: PlainTextResponse("served"))]
    client = TestClient(Starlette(routes=routes, middleware=middleware(local=True)), base_url="http://127.0.0.1")
    answer = client.get("/gradio_api/file=/here.png")
    assert answer.text == "served" and answer.headers["x-frame-options"] == "DENY"
    for path in ("/gradio_api/file=http://example.com/x", "/file=HTTPS://example.com", "/gradio_api/proxy=http://x"):
        assert client.get(path).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    far = TestClient(Starlette(routes=routes, middleware=middleware(local=False)), base_url="http://studio.example")
    assert far.get("/").text == "served" and far.get("/file=http://x").status_code == 403


def test_a_taken_port_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="choose another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_the_command_refuses_before_it_makes_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "studio"
    assert main(["studio", "--folder", str(folder), "--listen", "0.0.0.0"]) == 1
    assert "give --auth user:password" in capsys.readouterr().err and not folder.exists()
