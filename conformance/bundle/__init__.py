"""A run as a bundle: a folder that a third party can check, compare and read."""
