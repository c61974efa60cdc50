"""Arithmetic of sizes and counts."""


def ceil_div(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not under ``value``."""
    return ceil_div(value, multiple) * multiple
