"""Backends: one folder each. ``_torch`` is a library of kernels that several backends share."""

if __name__ != "glm5_hal.backends":
    raise ImportError("import glm5_hal.backends; the folder's bare name is not a package")
