"""Kunlunxin's backend on a stand-in device; see plugin.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from simulated.identities import IDENTITIES
from simulated.plugin import simulated

glm5_backend = simulated(IDENTITIES["kunlunxin"])
