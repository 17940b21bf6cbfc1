"""Anyone's layer through reloads, switches, poison and captures: as far as it offers them.

Legend: T tokens of this rank, H hidden_size.
"""

from collections.abc import Callable

from torch import Tensor

from twinmoe.oracle.offers import Counting, Poisonable, Reloadable, Switchable, graph_safe
from twinmoe.oracle.plain_graph import Answer, PlainGraph
from twinmoe.oracle.subject import Call
from twinmoe.reference.weights import MoEWeights


class PlainState:
    """What becomes of one layer between its forwards.

    ``make`` builds it on ``weights``, whose storage stays; ``left_out`` names what histories
    asked of it in vain (:data:`twinmoe.oracle.offers.WITHOUT`).
    """

    def __init__(self, make: Callable[[], object], weights: MoEWeights) -> None:
        self._make, self._weights = make, weights
        self.layer = make()
        self.left_out: set[str] = set()
        self._graphs: dict[object, PlainGraph] = {}
        #: What the layer had counted when its kill switch was turned on; None while it is off.
        self._calls_when_killed: int | None = None

    def reload(self, weights: MoEWeights) -> None:
        """Give the layer other weights; one that offers no reload is dropped and built anew."""
        if isinstance(self.layer, Reloadable):
            self.layer.reload(weights)
            return
        self.left_out.add("reload")
        self._graphs.clear()
        self.layer = None
        self._weights.copy_(weights)
        self.layer = self._make()

    def set_kill_switch(self, disabled: bool) -> None:
        """Turn the layer's switch; graphs captured before hold what ran then."""
        if not isinstance(self.layer, Switchable):
            self.left_out.add("set_kill_switch")
            return
        self._graphs.clear()
        self._calls_when_killed = self._calls() if disabled else None
        self.layer.set_kill_switch(disabled)

    def poison(self) -> None:
        """Spoil what the layer and its graphs keep between forwards."""
        for graph in self._graphs.values():
            graph.poison()
        if isinstance(self.layer, Poisonable):
            self.layer.poison()
        else:
            self.left_out.add("poison")

    def complaints(self) -> list[str]:
        """Say whether symmetric memory was used while it was switched off."""
        before, now = self._calls_when_killed, self._calls()
        if before is None or now is None or now == before:
            return []
        self._calls_when_killed = now
        return [
            f"with the kill switch on, symmetric memory was used or set up {now - before} times, "
            "by the layer's own count: the switch must leave plain collectives alone"
        ]

    def graph(
        self, forward: Callable[[Tensor], Answer], hidden_TH: Tensor, call: Call
    ) -> PlainGraph | None:
        """The graph of such a call, captured if it is the first; None if there can be none."""
        if call.path != "captured" or not any(call.tokens):
            return None
        # A CPU's stand-in would not see what other processes do.
        if not graph_safe(self.layer) or not (hidden_TH.is_cuda or len(call.tokens) == 1):
            self.left_out.add("graph_safe")
            return None
        if call.tokens not in self._graphs:
            self._graphs[call.tokens] = PlainGraph(forward, hidden_TH)
        return self._graphs[call.tokens]

    def _calls(self) -> int | None:
        if isinstance(self.layer, Counting):
            return self.layer.symmetric_calls()
        if isinstance(self.layer, Switchable):
            self.left_out.add("symmetric_calls")
        return None
