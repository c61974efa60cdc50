"""Lines with a mark: how our own are told apart in an output to which a site's wrappers, prologs and modules print."""

ANSWER = "vcppo reads: "
"""Before what was asked: by the format of squeue and sinfo, and by the doctor's probes before what they found."""
FINDING = "vcppo finds: "
"""Before what a node lacks."""


def marked(output: str, mark: str) -> list[str]:
    """What follows the mark in the lines that have it; a line of the site may stand before it without an end."""
    return [line.partition(mark)[2] for line in output.splitlines() if mark in line]
