"""Objectives that teach a student what a teacher knows."""
