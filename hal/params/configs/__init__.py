"""The built-in configurations: one config.json per model, with the values of its published checkpoint."""
