"""Where chains run: in this process, or as tasks of Ray workers."""

from sisa.execution.build import Build, Plan, build
from sisa.execution.options import Execution

__all__ = ["Build", "Execution", "Plan", "build"]
