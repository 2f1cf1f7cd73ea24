"""Restore and edit pictures with a diffusion model that was trained for neither."""

from .along import Along
from .confident_ode import CODE, BySigma, Langevin, LogSpaced
from .edit import Edited, edit
from .editor import Around, Band, Editor, Latents
from .measured import Colorize, Inpaint
from .sdedit import SDEdit

__all__ = [
    "CODE",
    "Along",
    "Around",
    "Band",
    "BySigma",
    "Colorize",
    "Edited",
    "Editor",
    "Inpaint",
    "Langevin",
    "Latents",
    "LogSpaced",
    "SDEdit",
    "edit",
]
