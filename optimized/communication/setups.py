"""What was set up for symmetric memory, counted where it is: people throw the kill switch for it.

Launch counters tell what ran; a rendezvous that hangs, or an allocation that does not fit, comes
before anything runs.
"""

from collections import Counter

#: Set-ups in this process so far, by name: "symmetric allocation", "rendezvous".
SETUPS: Counter[str] = Counter()


def set_up(name: str) -> None:
    """Count one set-up that is about to be tried."""
    SETUPS[name] += 1
