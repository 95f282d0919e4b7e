"""Rotary embedding, gated activation and Hadamard transform."""
