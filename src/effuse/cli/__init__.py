"""The commands of `effuse`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

from .deltas import delta, merge
from .editing import edit, restore, upscale
from .judging import diagnose, likelihood
from .knowing import methods, prove
from .sampling import sample
from .searching import search
from .slimming import compare, recipes, slim, train

app = typer.Typer(
    name="effuse",
    help="Make a diffusion pipeline small, fast and controllable. Lighter gases effuse faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_COMMANDS = (
    slim, recipes, search, compare, sample, edit, upscale, restore,
    likelihood, diagnose, delta, merge, train, methods, prove,
)  # fmt: skip
for command in _COMMANDS:
    app.command()(command)

# Importing diffusers tries torchao, if it is there, which warns of its kernels for other machines.
_CHATTER = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
# Read when these are imported: transformers tells of its optional packages, torch of its profiler.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def main(run: Callable[[], None] = app) -> None:
    """Run the command line; an error a user can mend is one line, not a traceback."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, quiet in _QUIET.items():
        os.environ.setdefault(name, quiet)
    try:
        run()
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C
            told = "stopped; slim, search and train go on where they were: give the command again"
            Console(stderr=True).print(told, highlight=False)
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("EFFUSE_DEBUG"):
            raise
        message = escape(str(error))
        Console(stderr=True).print(f"[bold red]error[/]: {message}", highlight=False)
        raise SystemExit(2) from error
