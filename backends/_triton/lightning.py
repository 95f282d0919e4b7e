"""Scores and top-k in one, without keeping the scores."""
