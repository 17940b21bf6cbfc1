"""Triton, interpreted where there is no CUDA device.

Triton decides between compiler and interpreter when a kernel is decorated, by
the environment variable ``TRITON_INTERPRET``.  Every kernel of this package
imports ``triton`` and ``tl`` from here, so that the choice is made once, before
the first decoration: the very same kernel bodies then run on a laptop.

A process is one or the other for its whole life.  Whoever starts processes for a
device hands them :func:`environment_for` it, whatever he is himself.
"""

import os
import warnings

import torch

# Asked last: a process that looks for CUDA devices cannot be forked into one that uses them.
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

#: True when kernels run in Triton's interpreter, on CPU tensors: as Triton reads its variable.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

if INTERPRETED:
    # NumPy warns of NaN and infinity, which a GPU computes with in silence.
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )


def kernels_run_on(device: torch.device) -> bool:
    """Whether this process' kernels reach ``device``: interpreted a CPU, compiled a GPU."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def environment_for(device: str) -> dict[str, str]:
    """What a process must find in its environment at its start to run kernels on ``device``.

    One for a CPU sees no CUDA device: nothing it does then differs from a machine without.
    """
    if torch.device(device).type == "cpu":
        return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"TRITON_INTERPRET": "0"}


__all__ = ["INTERPRETED", "environment_for", "kernels_run_on", "tl", "triton"]
