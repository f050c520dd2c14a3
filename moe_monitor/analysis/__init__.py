"""Analyses of recorded and counted routing, in plain numpy: nothing here needs a model."""

from moe_monitor.analysis.compare import Agreement, Comparison, compare, compare_choices, compare_counts
from moe_monitor.analysis.records import Record
from moe_monitor.analysis.specialisation import (
    co_activation,
    co_activation_bounds,
    domain_specialisation,
    router_saturation,
    saturation_at_most,
    vocabulary_specialisation,
)
from moe_monitor.analysis.summary import Summary, summarise

__all__ = [
    "Agreement",
    "Comparison",
    "Record",
    "Summary",
    "co_activation",
    "co_activation_bounds",
    "compare",
    "compare_choices",
    "compare_counts",
    "domain_specialisation",
    "router_saturation",
    "saturation_at_most",
    "summarise",
    "vocabulary_specialisation",
]
