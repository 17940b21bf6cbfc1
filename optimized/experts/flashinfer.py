"""Backend ``flashinfer``: the CUTLASS fused MoE of FlashInfer, where that is installed.

Nothing of FlashInfer is imported before a layer asks for this backend.

Shapes: M rows, K experts per row, S dispatched rows, H hidden_size, F rows of w13, L local
experts.
"""

import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from twinmoe.optimized.communication.errors import AllocationDuringCapture
from twinmoe.optimized.experts.backend import ExpertBackend
from twinmoe.optimized.launch import capturing, run
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights

#: (hidden_act, gated) -> the name in FlashInfer's ActivationType of the same function.
ACTIVATION_TYPES = {
    ("silu", True): "Swiglu",
    ("gelu", True): "Geglu",
    ("silu", False): "Silu",
    ("gelu", False): "Gelu",
    ("relu", False): "Relu",
    ("relu2", False): "Relu2",
}

#: Its tensor copy engine wants rows of a multiple of this many bytes.
ROW_BYTES = 16

#: The name that a call is counted under.
FUSED_MOE = "cutlass_fused_moe"


#: Held while the tuner, which is one for all layers and threads, is told what to choose from.
_TUNING = threading.Lock()


class Absence(Enum):
    """Why this backend does not run: the word that opens each reason."""

    DEVICE = "device"
    DTYPE = "dtype"
    ACTIVATION = "activation"
    SETTING = "setting"
    SIZE = "size"
    NOT_INSTALLED = "not installed"


def up_gate_rows(w13_LFH: Tensor, out_LFH: Tensor) -> None:
    """Write rows [gate | up] of every expert to ``out_LFH`` as FlashInfer's [up | gate]."""
    half = w13_LFH.shape[1] // 2
    out_LFH[:, :half].copy_(w13_LFH[:, half:])
    out_LFH[:, half:].copy_(w13_LFH[:, :half])


class FlashInferBackend(ExpertBackend):
    """One call does sorting, both GEMMs, the activation and the weighted sum.

    Rounding, found by measurement on Hopper: gate and up, h, y and the weighted sum each
    round to the model dtype; the sum over k itself is fp32.  Some tactics round elsewhere:
    they are kept from its tuner (``declared_tactics``).

    Keeps a second copy of gated w13, because its rows are in another order.  Each new
    number of rows is tuned at its first ``forward``: the default tactics reach a tenth of
    the memory bandwidth.  ``expert_rows``, whose numbers of rows are any, keeps to those.
    """

    name = "flashinfer"

    def __init__(self, config: MoEConfig, weights: MoEWeights, first_expert: int) -> None:
        super().__init__(config, weights, first_expert)
        self._fused_moe, self._tuner = _modules()
        kind = ACTIVATION_TYPES[config.hidden_act, config.gated]
        self._activation = getattr(self._fused_moe.ActivationType, kind)
        self._tuned: set[tuple[int, int]] = set()
        self._w13_LFH = weights.w13_LFH
        if config.gated:
            self._w13_LFH = torch.empty_like(weights.w13_LFH)
        self.refresh()

    @classmethod
    def unsupported(cls, config: MoEConfig, device: torch.device) -> str | None:
        """See ``ExpertBackend.unsupported``; the reason opens with one of ``Absence``."""
        found = _mismatch(config, device)
        if found is None:
            return None
        reason, text = found
        return f"{reason.value}: {text}"

    def forward(self, x_MH: Tensor, ids_MK: Tensor, weights_MK: Tensor, out_MH: Tensor) -> None:
        """See ``ExpertBackend.forward``; foreign experts and -1 are skipped inside."""
        if out_MH.dtype is x_MH.dtype:
            self._call(x_MH, ids_MK, weights_MK, out_MH)
            return
        narrow_MH = torch.empty_like(x_MH)
        self._call(x_MH, ids_MK, weights_MK, narrow_MH)
        out_MH.copy_(narrow_MH)

    def expert_rows(self, x_SH: Tensor, local_expert_S: Tensor) -> Tensor:
        """See ``ExpertBackend.expert_rows``: every row goes to one expert with weight 1."""
        y_SH = torch.empty_like(x_SH)
        ids_S1 = local_expert_S[:, None] + self.first_expert
        ones_S1 = torch.ones(ids_S1.shape, dtype=torch.float32, device=x_SH.device)
        self._call(x_SH, ids_S1, ones_S1, y_SH, tune=False)
        return y_SH

    def refresh(self) -> None:
        """See ``ExpertBackend.refresh``: the reordered rows follow the weights, in place."""
        if self.config.gated:
            up_gate_rows(self.weights.w13_LFH, self._w13_LFH)

    def _call(
        self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, *, tune: bool = True
    ) -> None:
        rows, per_row = ids.shape
        if rows == 0:
            return
        fresh = tune and (rows, per_row) not in self._tuned
        if fresh and capturing():
            raise AllocationDuringCapture(
                f"the flashinfer backend meets {rows} rows for the first time while a graph is "
                "captured: tuning allocates and waits for the device; run the layer on that many "
                "rows once before the capture"
            )
        local, w13_LFH, w2_LHI = self.weights.w2_LHI.shape[0], self._w13_LFH, self.weights.w2_LHI
        ids = ids.int()

        def compute() -> None:
            # Its table is looked up by bucket: this one holds exactly these rows.
            with (
                _TUNING,
                _declared_tactics_only(self._tuner),
                self._tuner.autotune(fresh, tuning_buckets=(rows,)),
            ):
                self._fused_moe.cutlass_fused_moe(
                    x,
                    ids,
                    weights,
                    w13_LFH,
                    w2_LHI,
                    x.dtype,
                    quant_scales=[],
                    ep_size=self.config.num_experts // local,
                    ep_rank=self.first_expert // local,
                    output=out,
                    tune_max_num_tokens=rows,
                    activation_type=self._activation,
                )

        run(FUSED_MOE, compute)
        if tune:
            self._tuned.add((rows, per_row))


@contextmanager
def _declared_tactics_only(tuner: Any) -> Iterator[None]:
    """Keep tactics from the tuner that round elsewhere than this backend declares.

    FlashInfer (0.6.13) has no option for that, and to its tuner all are alike.  One thread at a
    time: the tuner is one for all, and other operations of FlashInfer pass through untouched.
    """
    choose_one = tuner.AutoTuner.choose_one

    def choose(self: Any, operation: str, runners: list[Any], *args: Any, **kwargs: Any) -> Any:
        kind = type(runners[0])
        if not hasattr(runners[0], "fused_moe_runner"):
            return choose_one(self, operation, runners, *args, **kwargs)
        every_tactic = kind.get_valid_tactics
        which = int(operation.endswith("gemm2"))
        kind.get_valid_tactics = lambda runner, *_: declared_tactics(
            runner.fused_moe_runner.get_gemm1_tactic_count(),
            runner.fused_moe_runner.get_gemm2_tactic_count(),
        )[which]
        try:
            return choose_one(self, operation, runners, *args, **kwargs)
        finally:
            kind.get_valid_tactics = every_tactic

    tuner.AutoTuner.choose_one = choose
    try:
        yield
    finally:
        tuner.AutoTuner.choose_one = choose_one


def declared_tactics(gemm1_count: int, gemm2_count: int) -> tuple[list[int], list[int]]:
    """Numbers of the first and second GEMM's tactics that round as declared.

    The tactics are numbered through two lists: [n, n swapped, older kernels], and then
    [n, n that add, n swapped, n swapped that add, older kernels].  Older kernels of the
    first GEMM keep gate and up in registers, unrounded.  Those of the second that add do
    so in the output's dtype, by atomics: other bits in every run.  And a number below
    ``gemm2_count`` would be taken for one within the second list, hence for another
    tactic than the one measured.
    """
    n = (gemm2_count - gemm1_count) // 2
    within = [*range(n), *range(2 * n, 3 * n), *range(4 * n, gemm2_count)]
    second = [gemm1_count + i for i in within if gemm1_count + i >= gemm2_count]
    return list(range(2 * n)), second


def _mismatch(config: MoEConfig, device: torch.device) -> tuple[Absence, str] | None:
    if device.type != "cuda":
        return Absence.DEVICE, (
            f"({device.type}) has no CUTLASS kernels: they are built for CUDA; move the layer to "
            "cuda or use the triton backend"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return Absence.DEVICE, (
            f"of compute capability {major}.{minor} is untried: the rounding of these kernels was "
            "measured on 9.0 only; use the triton backend"
        )
    if config.dtype is not torch.bfloat16:
        return Absence.DTYPE, (
            f"({config.dtype}) is untried: the rounding of these kernels was measured for "
            "torch.bfloat16 only; use the triton backend"
        )
    return _unfit(config) or _import_failure()


def _unfit(config: MoEConfig) -> tuple[Absence, str] | None:
    if (config.hidden_act, config.gated) not in ACTIVATION_TYPES:
        kind = "gated" if config.gated else "plain"
        return Absence.ACTIVATION, (
            f"({kind} {config.hidden_act}) has no kernel there; use the triton backend"
        )
    if config.swiglu_limit is not None:
        return Absence.ACTIVATION, (
            f"with swiglu_limit ({config.swiglu_limit}) is another kernel there, of unmeasured "
            "rounding; use the triton backend"
        )
    if config.router_weight_on_input:
        return Absence.SETTING, (
            "router_weight_on_input (True) has no kernel there: it weighs outputs; use the triton "
            "backend"
        )
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(config, name)
        if size * config.dtype.itemsize % ROW_BYTES:
            return Absence.SIZE, (
                f"{name} ({size}) must be a multiple of {ROW_BYTES // config.dtype.itemsize}: its "
                f"copies need rows of {ROW_BYTES} bytes; use the triton backend"
            )
    return None


@functools.cache
def _import_failure() -> tuple[Absence, str] | None:
    try:
        _modules()
    except ImportError as error:
        return Absence.NOT_INSTALLED, (
            f"(import flashinfer: {error}); pip install 'twinmoe[cuda]', or use the triton backend"
        )
    return None


def _modules() -> tuple[ModuleType, ModuleType]:
    """FlashInfer's fused MoE and its tuner; raises ImportError where they are missing."""
    # By name, at run time: it is no dependency, and importing it takes seconds.
    return (
        importlib.import_module("flashinfer.fused_moe"),
        importlib.import_module("flashinfer.autotuner"),
    )
