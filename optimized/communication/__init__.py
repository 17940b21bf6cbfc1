"""Collectives over symmetric memory, and the choice of the transport that runs them."""

from twinmoe.optimized.communication.eligibility import INJECTABLE, Refusal, Tier
from twinmoe.optimized.communication.errors import (
    AllocationDuringCapture,
    SymmetricBufferOverflow,
    TransportError,
)
from twinmoe.optimized.communication.interface import Transport
from twinmoe.optimized.communication.pool import Capacity
from twinmoe.optimized.communication.pool_setup import release_pools
from twinmoe.optimized.communication.report import TransportReport
from twinmoe.optimized.communication.transport import select_transport

__all__ = [
    "INJECTABLE",
    "AllocationDuringCapture",
    "Capacity",
    "Refusal",
    "SymmetricBufferOverflow",
    "Tier",
    "Transport",
    "TransportError",
    "TransportReport",
    "release_pools",
    "select_transport",
]
