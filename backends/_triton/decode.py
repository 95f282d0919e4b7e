"""Attention over all keys of a request, in the absorbed form."""
