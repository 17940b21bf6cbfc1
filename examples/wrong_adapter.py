"""A deliberate mistake: gate and up swapped on the way into a block.  The check must fail.

    twinmoe check --subject examples/wrong_adapter.py:mixtral

It ends with exit code 1, and names the mistake:

    this is what one gets if gate and up are swapped
"""

from dataclasses import replace

import hugging_face_blocks
import torch

from twinmoe.oracle.plain_layer import PlainLayer
from twinmoe.oracle.worker import RankContext
from twinmoe.reference.config import MoEConfig
from twinmoe.reference.weights import MoEWeights


def mixtral(config: MoEConfig, weights: MoEWeights, place: RankContext) -> PlainLayer:
    """Mixtral's block with the rows of w13 taken for [up | gate], as FlashInfer orders them."""
    gate, up = weights.w13_LFH.chunk(2, dim=1)
    swapped = replace(weights, w13_LFH=torch.cat([up, gate], dim=1))
    return hugging_face_blocks.mixtral(config, swapped, place)
