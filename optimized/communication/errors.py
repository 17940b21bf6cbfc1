"""What can go wrong with a transport, by name."""


class TransportError(RuntimeError):
    """A transport could not be set up, or was used against its rules; raised on all ranks alike."""


class SymmetricBufferOverflow(TransportError):  # noqa: N818 - says what happened
    """A collective, or a grown pool, needs more symmetric memory than there may be."""


class PeerTimeout(TransportError):  # noqa: N818 - says what happened
    """A kernel waited for a peer in vain: results since then are garbage, and so is its pool."""


class AllocationDuringCapture(TransportError):  # noqa: N818
    """Symmetric memory was asked for while a graph capture is live."""
