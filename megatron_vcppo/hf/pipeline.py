"""How many layers each pipeline stage holds."""

from megatron_vcppo.errors import UserError
from megatron_vcppo.integers import ceil_div

Ends = tuple[int | None, int | None]
"""Layers of the first and of the last stage, as configured; None: by the rule of ``stage_layers``."""


def stage_layers(num_layers: int, pp: int, ends: Ends = (None, None)) -> tuple[int, ...]:
    """Layers of each of ``pp`` stages, in order; their sum is num_layers.

    As many on each where they divide. Otherwise no stage has more than the next larger number, and what is missing to
    it in all is taken from the last and the first stage, which hold output layer and embedding, up to half of theirs,
    then one each from the stages before the last. With a given end the other stages get equal numbers, the earlier ones
    one more where they do not divide. Raises UserError, with the numbers, if a stage would have no layer.
    """
    if pp < 1 or num_layers < pp:
        raise UserError(f"{num_layers} layers cannot be divided over pp {pp}")
    if ends != (None, None) and pp > 1:
        return _with_ends(num_layers, pp, *ends)
    most = ceil_div(num_layers, pp)
    layers, missing = [most] * pp, most * pp - num_layers
    from_ends = min(missing, 2 * (most // 2))
    layers[0] -= from_ends // 2
    layers[-1] -= from_ends - from_ends // 2
    for stage in range(pp - 2, pp - 2 - (missing - from_ends), -1):
        layers[stage] -= 1
    return tuple(layers)


def _with_ends(num_layers: int, pp: int, first: int | None, last: int | None) -> tuple[int, ...]:
    others = pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if rest < others or (rest and not others):
        given = " and ".join(
            f"parallel.{name}_stage_layers {size}" for name, size in (("first", first), ("last", last)) if size
        )
        raise UserError(f"{given} leave {rest} of {num_layers} layers to {others} other stages of pp {pp}")
    middle = [rest // others + (stage < rest % others) for stage in range(others)]
    return (*([first] if first else []), *middle, *([last] if last else []))
