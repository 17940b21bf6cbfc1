"""Which classes a MoELayer is built from."""

from dataclasses import dataclass

from twinmoe.optimized.dispatcher import InferenceCUDAGraphTokenDispatcher
from twinmoe.optimized.experts import InferenceGroupedMLP
from twinmoe.optimized.router import InferenceTopKRouter
from twinmoe.optimized.shared_expert import InferenceSharedExpert
from twinmoe.reference.dispatch import MoEAlltoAllTokenDispatcher
from twinmoe.reference.router import TopKRouter
from twinmoe.reference.shared_expert import SharedExpertMLP


@dataclass(frozen=True, kw_only=True)
class InferenceSpecProvider:
    """The parts of the inference layer; replace one to try your own in its place.

    ``eager_*`` run outside graphs, where splits may be read on the host; the others run
    captured.  Experts serve both.
    """

    eager_router: type[TopKRouter] = TopKRouter
    eager_dispatcher: type[MoEAlltoAllTokenDispatcher] = MoEAlltoAllTokenDispatcher
    router: type[InferenceTopKRouter] = InferenceTopKRouter
    dispatcher: type[InferenceCUDAGraphTokenDispatcher] = InferenceCUDAGraphTokenDispatcher
    experts: type[InferenceGroupedMLP] = InferenceGroupedMLP
    shared_expert: type[SharedExpertMLP] = InferenceSharedExpert
