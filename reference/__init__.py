"""The readable twin: what a Mixture-of-Experts layer means."""

from twinmoe.reference.checkpoint import CheckpointError
from twinmoe.reference.config import DTYPES, ConfigError, MoEConfig, dtype_name
from twinmoe.reference.dense import dense_moe
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher, PeerError
from twinmoe.reference.experts import SequentialMLP
from twinmoe.reference.hugging_face import HuggingFaceCheckpoint
from twinmoe.reference.layer import MoELayer
from twinmoe.reference.placement import Placement
from twinmoe.reference.published import PUBLISHED, published, scaled
from twinmoe.reference.router import Routing, TopKRouter
from twinmoe.reference.shared_expert import SharedExpertMLP
from twinmoe.reference.weights import MoEWeights

__all__ = [
    "DTYPES",
    "PUBLISHED",
    "CheckpointError",
    "ConfigError",
    "HuggingFaceCheckpoint",
    "MoEAlltoAllTokenDispatcher",
    "MoEConfig",
    "MoELayer",
    "MoEWeights",
    "PeerError",
    "Placement",
    "Routing",
    "SequentialMLP",
    "SharedExpertMLP",
    "TopKRouter",
    "dense_moe",
    "dtype_name",
    "published",
    "scaled",
]
