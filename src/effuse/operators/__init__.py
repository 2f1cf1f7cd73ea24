"""Operators: what is measured of a picture. y = A x, with adjoint and pseudo-inverse."""

from .linear import Average, Blur, Known, Mix, colors

__all__ = ["Average", "Blur", "Known", "Mix", "colors"]
