"""Fewer bits a number: weights, and activations on the fly.

Grids are in `effuse.ops.grid`, layers in `effuse.nn.quantized`; `effuse.compress.swap` puts
them in and out.
"""
