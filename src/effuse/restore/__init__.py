"""Restore and edit pictures with a diffusion model that was trained for neither."""

from .confident_ode import CODE, BySigma, Langevin, LogSpaced
from .edit import Edited, edit
from .editor import Around, Band, Editor, Latents
from .sdedit import SDEdit

__all__ = [
    "CODE",
    "Around",
    "Band",
    "BySigma",
    "Edited",
    "Editor",
    "Langevin",
    "Latents",
    "LogSpaced",
    "SDEdit",
    "edit",
]
