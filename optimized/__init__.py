"""The fast twin: CUDA-graphed inference MoE over symmetric memory.

``MoELayer`` is the layer, ``GraphRunner`` captures and replays it by bucket.
"""
