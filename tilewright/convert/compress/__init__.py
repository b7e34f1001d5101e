"""Algorithms on one weight and the rows that reach it."""
