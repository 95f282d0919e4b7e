"""Exact top-k with a total order."""
