"""The experts' results, weighted and added."""
