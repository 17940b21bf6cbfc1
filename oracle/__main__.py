"""``python -m twinmoe.oracle``: the ``twinmoe`` command without an installed script."""

from twinmoe.oracle.cli import main

main()
