"""A checksum of a tensor's bytes, the same on a CPU and on a GPU."""

import torch

WORDS_AT_ONCE = 1 << 20
"""The computation holds about 24 bytes for each of these."""


def checksum(tensor: torch.Tensor) -> int:
    """The sum over the tensor's 32-bit words of word × (position + 1), modulo 2^64; any dtype and shape.

    It notices every change of one word and words that changed places. It is no protection from an attacker.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4 or flat.storage_offset() % 4:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).clone()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    position = 1
    for words in flat.view(torch.int32).split(WORDS_AT_ONCE):
        weights = torch.arange(position, position + words.numel(), dtype=torch.int64, device=flat.device)
        total += (weights * words).sum()
        position += words.numel()
    return int(total)


def compare(name: str, tensor: torch.Tensor, expected: int | None) -> None:
    """Raises RuntimeError if the tensor is not what its checksum says; None: not compared."""
    if expected is not None and checksum(tensor) != expected:
        raise RuntimeError(f"{name} arrived with other bytes than were sent (weight_sync.verify)")
