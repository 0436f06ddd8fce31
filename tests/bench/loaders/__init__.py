"""Loaders of training images side by side: the same JPEGs, the same work, each loader in its own best documented way.

The work is decode → RandomResizedCrop(224) → flip → uint8 batches of 128. One module per peer: ``batches(data,
workers)`` yields them, ``convert(data)`` makes the peer's own format from the bytes that our shards hold.
"""

SIDE = 224
BATCH = 128
