"""Transforms that make a network smaller or cheaper, and what they share.

`units` are the removable branches of a network with their costs; `calibrate` records the calls on
which transforms are calibrated. Each folder is one way to compress.
"""
