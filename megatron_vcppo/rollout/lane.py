"""The device and stream that the transfers of a push use, apart from those of the model's own work.

A transfer that hangs must hold up nothing else, and a buffer must not be written again while it is still being copied
out of: both need a separate stream and an explicit hand-over. Without CUDA there are no streams and nothing to do.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class Lane:
    """A stream on one device. Example: ``with lane.entered(): group.wait(work)``, in any thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Device and stream of the calling thread are the lane's: a new thread's are GPU 0 and its default stream."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def follow(self) -> None:
        """What the lane does from now on comes after what the calling thread's stream was given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors made in the lane may be used on the calling thread's stream.

        That stream waits for what fills them, and their memory is given to a later tensor of the lane only when that
        stream has passed the point at which they are freed.
        """
        if self.stream is None:
            return
        user = torch.cuda.current_stream(self.device)
        user.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(user)

    def finish(self) -> None:
        """Wait until the lane has done what it was given."""
        if self.stream is not None:
            self.stream.synchronize()
