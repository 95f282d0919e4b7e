"""Backend plugins: found, loaded in isolation, put in order; then probed, and asked for their kernels.

Whatever a plugin does becomes a record with a code, a reason and a fix: one broken plugin breaks neither the import nor
the others. One that ends or hangs the process is caught by those who look at every plugin, in a child process
(`check_up`); a call loads no plugin but those that may serve it.
"""

from glm5_hal.plugins.child import Checkup, check_up
from glm5_hal.plugins.discovery import find, order, settle
from glm5_hal.plugins.kernels import load_kernels
from glm5_hal.plugins.loading import LOAD_DEADLINE, load
from glm5_hal.plugins.probing import PROBE_DEADLINE, probe
from glm5_hal.plugins.record import CODES, PluginRecord
from glm5_hal.plugins.survey import survey
from glm5_hal.plugins.vetting import check_up_all, vetted

__all__ = [
    "CODES",
    "LOAD_DEADLINE",
    "PROBE_DEADLINE",
    "Checkup",
    "PluginRecord",
    "check_up",
    "check_up_all",
    "find",
    "load",
    "load_kernels",
    "order",
    "probe",
    "settle",
    "survey",
    "vetted",
]
