"""Tensors in, tensors out: small exact pieces that know nothing of models."""

from .tensors import expand_as, randn_like, require_finite, weighted_sum

__all__ = ["expand_as", "randn_like", "require_finite", "weighted_sum"]
