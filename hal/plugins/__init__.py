"""Backend plugins: found, loaded in isolation, put in order; then probed, and asked for their kernels.

Whatever a plugin does short of ending the process becomes a record with a code, a reason and a fix: one broken plugin
breaks neither the import nor the others.
"""

from glm5_hal.plugins.child import probe_in_subprocess
from glm5_hal.plugins.discovery import discover
from glm5_hal.plugins.kernels import load_kernels, signature_difference
from glm5_hal.plugins.loading import LOAD_DEADLINE, load
from glm5_hal.plugins.probing import PROBE_DEADLINE, probe
from glm5_hal.plugins.record import CODES, PluginRecord

__all__ = [
    "CODES",
    "LOAD_DEADLINE",
    "PROBE_DEADLINE",
    "PluginRecord",
    "discover",
    "load",
    "load_kernels",
    "probe",
    "probe_in_subprocess",
    "signature_difference",
]
