"""The live ensemble: loading its constituents and turning their posteriors into one answer."""

from sisa.ensemble.aggregation import aggregate
from sisa.ensemble.live import Answer, LiveEnsemble

__all__ = ["Answer", "LiveEnsemble", "aggregate"]
