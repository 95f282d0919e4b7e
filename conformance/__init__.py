"""The conformance suite: what a vendor runs to prove a chip, and what its customer re-reads.

Case (from the specs) -> inputs (exact grid) -> float64 oracle -> the kernel -> checks -> verdict. See
``docs/conformance.md``.
"""

if __name__ != "glm5_hal.conformance":
    raise ImportError("import glm5_hal.conformance; the folder's bare name is not a package")
