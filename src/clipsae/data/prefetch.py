"""The next batch is made on the GPU beside the training step."""

from collections.abc import Iterator
from concurrent.futures import Future

import torch

from clipsae.data.loader import Batch, tensors


def prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each of them enqueued on a CUDA stream of its own before the one that
    precedes it is handed out: its copy to the GPU and the CLIP's prefix run beside the step.

    The GPU then holds a batch more, or of mixed tokens a block more. An error is raised when its
    batch is due: a training that ends before does not need it.

    Args:
        batches: makes tensors on the device, in the stream that is current.
        device: a CUDA device.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # which may be copying CLIP's weights

    def enqueue() -> "Future[tuple[Batch | None, torch.cuda.Event]]":
        made: Future[tuple[Batch | None, torch.cuda.Event]] = Future()
        try:
            with torch.cuda.stream(side):
                made.set_result((next(batches, None), side.record_event()))
        except Exception as error:
            made.set_exception(error)
        return made

    ahead = enqueue()
    while True:
        batch, done = ahead.result()
        if batch is None:
            return
        ahead = enqueue()
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        # Its memory is the side stream's, and must not be given away before the step is done.
        for tensor in tensors(batch):
            tensor.record_stream(current)
        yield batch
