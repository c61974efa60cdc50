"""Numbers as people read them."""

import math


def short(value: float) -> str:
    """Three digits, without a needless exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def percent_interval(share: float, half_width: float) -> str:
    """Example: (0.412, 0.031) → 41.2 ± 3.1 %."""
    return f"{100 * share:.1f} ± {100 * half_width:.1f} %"


def duration(seconds: float) -> str:
    """Example: 1 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
