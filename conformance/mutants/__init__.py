"""Kernels that are wrong on purpose, and honest ones, by which the suite itself is judged.

``honest``: kernels that share no code with the references and must all pass. ``wrong``: written by hand, one thing
wrong with each. ``cheats``: made to look right. ``mechanical``: our own kernels with one change to their source.
"""
