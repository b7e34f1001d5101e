"""Packages that run without Python."""
