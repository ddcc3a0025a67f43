"""Confidence intervals of shares."""

import math

Z = 1.96  # of a standard normal: 95 % lie within


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, https://doi.org/10.1080/01621459.1927.10502953; (0, 1) if `count` is 0."""
    if not count:
        return 0.0, 1.0
    share = correct / count
    middle, width = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    low, high = ((middle + sign * width) / (1 + Z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)  # but for rounding, they are within
