"""Attention over chosen keys, in the absorbed form."""
