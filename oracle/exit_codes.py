"""Exit codes of all commands, in a module that imports nothing: Ctrl-C may need one at once."""

EQUIVALENT = 0
NOT_EQUIVALENT = 1
COULD_NOT_RUN = 2
#: The system, or somebody, ended or stopped a rank: that says nothing about its layer.
ENDED_FROM_OUTSIDE = 3
#: All is well but for a report, or the output itself, that could not be written.
NOT_WRITTEN = 4
INTERRUPTED = 130


def verdict_code(*, wrong: bool, not_judged: bool = False, cut_off: bool = False) -> int:
    """What is wrong comes first; then what no verdict was found on, our doing before others'."""
    if wrong:
        return NOT_EQUIVALENT
    if not_judged:
        return COULD_NOT_RUN
    return ENDED_FROM_OUTSIDE if cut_off else EQUIVALENT
