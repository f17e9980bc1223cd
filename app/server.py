"""The studio as a server: who may come in, what is given out, and the worker beside it."""

from __future__ import annotations

import hmac
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from spectral_diffusion.errors import InputError

LOCAL = ("127.0.0.1", "localhost")
AUTH_VARIABLE = "SPECTRAL_DIFFUSION_AUTH"
"""Environment variable with `user:password`, for those who do not want it on a command line."""
DEFAULT_PORT = 7860
MAX_UPLOAD = "1gb"
"""What a LoRA of every layer of SDXL may take; photos may be no larger than `photos.MAX_UPLOAD`."""
_MOST_FAILURES, _PERIOD = 5, 60.0  # wrong logins in so many seconds; then nobody gets in for as long
_TASKS = "app.actions.tasks:TASKS"


class Doorkeeper:
    """Checks logins: compares in constant time, and lets nobody in for a minute after five wrong ones."""

    def __init__(self, user: str, password: str, clock: Callable[[], float] = time.monotonic):
        self._user, self._password, self._clock = user.encode(), password.encode(), clock
        self._failures: deque[float] = deque(maxlen=_MOST_FAILURES)

    def __call__(self, user: str, password: str) -> bool:
        """Tell whether this is the user with the password."""
        if len(self._failures) == _MOST_FAILURES and self._clock() - self._failures[0] < _PERIOD:
            return False
        right = hmac.compare_digest(user.encode(), self._user) & hmac.compare_digest(password.encode(), self._password)
        if not right:
            self._failures.append(self._clock())
        return bool(right)


def check_access(listen: str, auth: str | None) -> Doorkeeper | None:
    """Return who keeps the door, None for a studio that only this computer reaches and that asked for none.

    Raises:
        InputError: others could reach it without a login, or `auth` is not `user:password`.
    """
    auth = auth or os.environ.get(AUTH_VARIABLE) or None
    if auth is None:
        if listen not in LOCAL:
            raise InputError(f"Others could reach the studio on '{listen}'; give --auth user:password, or set {AUTH_VARIABLE}.")
        return None
    user, _, password = auth.partition(":")
    if not user or len(password) < 8:
        raise InputError("--auth must be user:password, with a password of at least 8 characters.")
    return Doorkeeper(user, password)


def check_port(listen: str, port: int) -> None:
    """Raise `InputError` when the port cannot be used."""
    with socket.socket(socket.AF_INET6 if ":" in listen else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"The studio cannot listen on {listen}, port {port} ({error}); choose another --port.") from error


def serve(root: Path, *, port: int, listen: str, auth: str | None, on_ready: Callable[[str], None]) -> None:
    """Open the studio in `root` and serve it until Ctrl-C or SIGTERM.

    Args:
        on_ready: called with the page's address.

    Raises:
        InputError: see `check_access` and `check_port`.
        StorageError: the folder cannot be made or written to.
    """
    keeper = check_access(listen, auth)
    check_port(listen, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(root.resolve() / "uploads")

    import torch

    from app.actions.concepts import add_samples
    from app.actions.studio import SERVED, open_studio
    from app.actions.trainings import look_at_base
    from app.guard import middleware, wait_for_the_end
    from app.jobs import WorkerProcess
    from app.ui.live import MOST_PAGES
    from app.ui.page import STYLE, build_page, theme

    torch.set_num_threads(1)  # the processors are the worker's
    studio = open_studio(root)
    add_samples(studio)
    look_at_base(studio)
    with WorkerProcess(studio.folder("jobs"), _TASKS):
        page = build_page(studio)
        _, address, _ = page.launch(
            server_name=listen,
            server_port=port,
            auth=keeper,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_threads=MOST_PAGES,
            allowed_paths=[str(studio.folder(name)) for name in SERVED],
            max_file_size=MAX_UPLOAD,
            app_kwargs={
                "middleware": middleware(local=listen in LOCAL),
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            theme=theme(),
            css_paths=STYLE,
        )
        on_ready(address)
        wait_for_the_end()
        page.close(verbose=False)
