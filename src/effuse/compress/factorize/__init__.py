"""Fewer numbers a layer: weights as products of thin factors, in `effuse.nn.low_rank`."""
