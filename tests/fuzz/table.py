"""``python -m tests.fuzz.table [N]``: N damaged inputs of each kind, and how many held."""

from __future__ import annotations

import sys

from tests.fuzz.bounds import bounded
from tests.fuzz.kinds import KINDS, read_damaged


def main(tried: int) -> int:
    """Print the table and the seeds that did not hold; the exit code says whether all did."""
    broken = []
    print(f"| kind | tried | refused by name | read | held |\n|---|{'---:|' * 4}")
    for kind in KINDS:
        read = held = 0
        for seed in range(tried):
            try:
                with bounded():
                    read += read_damaged(kind, seed)
                held += 1
            except Exception as error:  # whatever it is, it is no documented one
                broken.append(f"{kind}, seed {seed}: {type(error).__name__}: {error!s:.200}")
        print(f"| {kind} | {tried} | {held - read} | {read} | {held} |", flush=True)
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 250))
