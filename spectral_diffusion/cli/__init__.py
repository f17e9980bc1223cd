"""The command line, `spectral-diffusion COMMAND ...`.

Each command is a module with `SUMMARY`, `add_arguments(parser)` and `run(arguments, console) -> int`. What takes long
to import is imported inside these functions, and only the chosen command's arguments are added, so that help is quick.

Exit codes: 0, 1 (it failed; one sentence on stderr says why), 2 (wrong use).
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from spectral_diffusion.cli import compare, demo, export, fuse, generate, import_lora, info, mask, score, studio, train
from spectral_diffusion.cli.console import Console, log_lines_on_stderr, survive_any_encoding
from spectral_diffusion.cli.displays import StageDisplay
from spectral_diffusion.cli.options import Parser
from spectral_diffusion.errors import SpectralDiffusionError, sentence_on
from spectral_diffusion.stages import listening

__all__ = ["COMMANDS", "main"]

FAILED, WRONG_USE = 1, 2
_STOPPED = "Stopped by Ctrl-C."

COMMANDS: dict[str, ModuleType] = {
    "mask": mask,
    "train": train,
    "fuse": fuse,
    "generate": generate,
    "score": score,
    "compare": compare,
    "export": export,
    "import": import_lora,
    "info": info,
    "demo": demo,
    "studio": studio,
}
"""Name to module of every command."""

_DESCRIPTION = "Put your own dog, cat and friends into one Stable Diffusion picture."
_EXAMPLE = """a first picture of two concepts:
  spectral-diffusion train photos/dog --token "<V1>" --class-word dog --preset fast --out out/dog.safetensors
  spectral-diffusion train photos/cat --token "<V2>" --class-word cat --preset fast --avoid out/dog.safetensors \\
      --out out/cat.safetensors
  spectral-diffusion fuse out/dog.safetensors out/cat.safetensors --out out/pair.safetensors
  spectral-diffusion generate --adapter out/pair.safetensors --prompt "<V1> and <V2> near a lake" --out out/pictures

'spectral-diffusion COMMAND --help' explains one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after the program's name; those of this process when missing.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    display = StageDisplay()  # reading the words takes a second already, where they are checked with torch
    survive_any_encoding()
    with warnings.catch_warnings(), log_lines_on_stderr():
        if "--debug" not in words:
            warnings.simplefilter("ignore")
        try:
            arguments = _build_parser(words).parse_args(words)
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else 0
        except KeyboardInterrupt:
            print(f"Error: {_STOPPED}", file=sys.stderr)
            return FAILED
        return _run(arguments, display)


def _build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(
        prog="spectral-diffusion",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('spectral-diffusion')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    chosen = next((word for word in words if word in COMMANDS), None)
    for name, module in COMMANDS.items():
        summary = module.SUMMARY
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show where in the program an error happened")
    return parser


def _run(arguments: argparse.Namespace, display: StageDisplay) -> int:
    console = Console(json_target=arguments.json)
    try:
        console.check()
        for path in _files_of(arguments):
            console.keep_off(path)
        with closing(display), listening(display.show):
            return COMMANDS[arguments.command].run(arguments, console)
    except SpectralDiffusionError as error:
        return _fail(str(error), arguments)
    except KeyboardInterrupt:
        return _fail(_STOPPED, arguments)
    except Exception as error:  # whatever happens, the user gets a sentence
        return _fail(sentence_on(error, "" if arguments.debug else "; run it again with --debug to see where"), arguments)


def _files_of(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield every file or folder that the user named."""
    for value in vars(arguments).values():
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Path))


def _fail(sentence: str, arguments: argparse.Namespace) -> int:
    if arguments.debug:
        traceback.print_exc()
    print(f"Error: {sentence}", file=sys.stderr)
    return FAILED
