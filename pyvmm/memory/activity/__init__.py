# activity: which blocks of a guest's memory are in use, by watching a few of them at a time (technique T8).
"""`Sampler`, which watches; `WorkingSet` and `HeatMap`, of what it has seen."""

from pyvmm.memory.activity.heatmap import HeatMap
from pyvmm.memory.activity.sampler import Sampler, SamplerCounts
from pyvmm.memory.activity.working_set import Estimate, WorkingSet

__all__ = ["Estimate", "HeatMap", "Sampler", "SamplerCounts", "WorkingSet"]
