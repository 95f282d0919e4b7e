"""The hook that a backend plugin implements. The docstring is the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from glm5_hal.backend import Backend

GROUP = "glm5_hal.backends"

hookspec = pluggy.HookspecMarker("glm5_hal")
hookimpl = pluggy.HookimplMarker("glm5_hal")


@hookspec
def glm5_backend() -> Backend:  # type: ignore[empty-body]
    """Return the plugin's one :class:`glm5_hal.backend.Backend`.

    Called once per process, when the catalogue of backends is first needed. It must be cheap and must not import
    the vendor's SDK or touch a device: that belongs into ``Backend.probe`` and ``Backend.kernels``. An exception
    here, or at the import of the module, disables this plugin alone; ``glm5-hal doctor`` shows it.

    The module is named by an entry point of the group ``glm5_hal.backends`` whose name is the backend's name.
    """
