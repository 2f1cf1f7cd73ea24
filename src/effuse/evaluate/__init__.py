"""Judges of what was made and of what it cost."""
