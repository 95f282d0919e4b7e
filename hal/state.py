"""What serving needs beside calls, under one name: cache formats, prepared weights, the plan of a step, rope tables."""

from glm5_hal.formats import FORMATS, CacheFormat, cache_format, formats, preferred_formats
from glm5_hal.plan import StepPlan, current_plan, host_list, schedule
from glm5_hal.prepared import Prepared, prepare
from glm5_hal.rope import rope_tables

__all__ = [
    "FORMATS",
    "CacheFormat",
    "Prepared",
    "StepPlan",
    "cache_format",
    "current_plan",
    "formats",
    "host_list",
    "preferred_formats",
    "prepare",
    "rope_tables",
    "schedule",
]
