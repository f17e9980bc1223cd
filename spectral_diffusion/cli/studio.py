"""`spectral-diffusion studio`: the web page, photos to exported file."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from spectral_diffusion.cli.console import Console, open_libraries
from spectral_diffusion.cli.options import add_json_option

SUMMARY = "open the studio: photos to exported file in one web page"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port of the page (default: %(default)s)")
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; others than this computer's own need a login (default: %(default)s)",
    )
    parser.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for a login; SPECTRAL_DIFFUSION_AUTH in the environment does the same and is not seen by other programs",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("out/studio"), metavar="FOLDER", help="where all is kept (default: %(default)s)"
    )
    add_json_option(parser, "the page's address, once it is there,")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Serve the page until Ctrl-C."""
    open_libraries()
    # By name: the library never imports the studio, it only starts it.
    serve = importlib.import_module("app.server").serve

    def ready(address: str) -> None:
        console.say(f"The studio is at {address} (Ctrl-C ends it).")
        console.give({"address": address})

    serve(arguments.folder, port=arguments.port, listen=arguments.listen, auth=arguments.auth, on_ready=ready)
    return 0
