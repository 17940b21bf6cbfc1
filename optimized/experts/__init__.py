"""The experts of one rank: InferenceGroupedMLP and the backends that compute it."""

from twinmoe.optimized.experts.backend import ExpertBackend
from twinmoe.optimized.experts.choice import AUTO, BACKENDS, backend_report, choose_backend
from twinmoe.optimized.experts.grouped_mlp import InferenceGroupedMLP

__all__ = [
    "AUTO",
    "BACKENDS",
    "ExpertBackend",
    "InferenceGroupedMLP",
    "backend_report",
    "choose_backend",
]
