"""Normalisation and int8 quantisation in one pass."""
