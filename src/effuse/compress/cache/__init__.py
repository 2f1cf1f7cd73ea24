"""Reuse what a network computed at an earlier step instead of computing it again."""
