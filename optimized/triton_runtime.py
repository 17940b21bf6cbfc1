"""Triton, interpreted where there is no CUDA device.

Triton decides between compiler and interpreter when a kernel is decorated, by
the environment variable ``TRITON_INTERPRET``.  Every kernel of this package
imports ``triton`` and ``tl`` from here, so that the choice is made once, before
the first decoration: the very same kernel bodies then run on a laptop.
"""

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

#: True when kernels run in Triton's interpreter, on CPU tensors: as Triton reads its variable.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

if INTERPRETED:
    # NumPy warns of NaN and infinity, which a GPU computes with in silence.
    warnings.filterwarnings(
        "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )

__all__ = ["INTERPRETED", "tl", "triton"]
