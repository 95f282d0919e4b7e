"""Attention with full heads over ragged batches."""
