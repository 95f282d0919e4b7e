"""What importing the package costs."""

import subprocess
import sys


def test_neither_plugins_nor_policy_import_torch() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; import glm5_hal.plugins, glm5_hal.policy"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
