"""Crop-ready JPEGs: the same coefficients with restart markers, so that a crop decodes only its own part of the file.

Nothing is lost and every decoder reads them; each rewritten file is read back and compared before it is used.
"""

from __future__ import annotations

import math

from orchestrator.data.kernel import JpegFacts, load_kernel

NEAR_MCUS = 4
"""Wished length of a restart interval: shorter ones cost bytes, longer ones decode pixels that the crop drops."""
MOST_GROWTH = 1.02
MOST_GROWTH_PROGRESSIVE = 1.25
"""A progressive file becomes a sequential one, larger and twice as fast to decode."""
MOST_INTERVAL = 65535


def is_available() -> bool:
    """Whether this machine can rewrite JPEGs; it takes the compiled kernel."""
    return not isinstance(load_kernel(), str)


def make_crop_ready(data: bytes) -> bytes | None:
    """A JPEG with restart intervals of about 4 MCUs; None where it is none, is so already or would grow too much."""
    kernel = load_kernel()
    if isinstance(kernel, str):
        return None
    facts = kernel.describe(data)
    if facts is None:
        return None
    if is_ready(facts):
        return None
    most = len(data) * (MOST_GROWTH if facts.baseline else MOST_GROWTH_PROGRESSIVE)
    for interval in intervals(facts.columns):
        rewritten = kernel.rewrite(data, interval)
        if rewritten is None:
            return None
        if len(rewritten) <= most:
            return rewritten
    return None


def is_ready(facts: JpegFacts) -> bool:
    """Whether a JPEG already has restart intervals that divide its rows of MCUs."""
    return facts.baseline and facts.interval > 0 and facts.columns % facts.interval == 0


def intervals(columns: int) -> list[int]:
    """Divisors of a row of MCUs to try: the nearest to 4 first, then longer ones, which cost fewer bytes."""
    divisors = [d for d in range(1, min(columns, MOST_INTERVAL) + 1) if columns % d == 0]
    best = min(divisors, key=lambda divisor: abs(math.log(divisor / NEAR_MCUS)))
    return [divisor for divisor in divisors if divisor >= best][:4]
