"""Images of sequences that run: from patches to features one at a time, and to nothing once the prompt is stored.

Each stage needs less memory than the one before, and gives the rest back. A sequence whose caches were lost begins
anew with the files. In the engine's thread; what runs between two images is `service.py`'s.
"""

import time
from dataclasses import replace

from mlx_edge.engine.images.features import drop_pixels
from mlx_edge.engine.intake import prepare
from mlx_edge.engine.scheduler import Job
from mlx_edge.engine.served import Served
from mlx_edge.engine.task import Task
from mlx_edge.errors import MemoryBudgetError


class ImageStage:
    """What happens to images between admission and the first token."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def begin(self, job: Job, task: Task) -> None:
        """A sequence was admitted: it is ready when no image is to be encoded of those that it still has to read."""
        sequence, features = task.sequence, self._served.features
        assert sequence is not None
        if sequence.images is None or features is None:
            return
        job.is_ready = features.find(sequence.images, sequence.num_stored)
        if job.is_ready:
            assert task.prepared is not None
            drop_pixels(sequence.images)
            task.prepared.release()
            self._served.ledger.reserve(task.key, task.prepared.needs.encoded)

    def encode_one(self, job: Job, task: Task) -> float | None:
        """Run the tower on the next image of a sequence that is not ready; the seconds that it took.

        None when another sequence had the same images encoded meanwhile. Raises: what the tower fails with.
        """
        sequence, features = task.sequence, self._served.features
        assert features is not None
        assert sequence is not None
        assert sequence.images is not None
        self.begin(job, task)
        if job.is_ready:
            return None
        began = time.monotonic()
        features.encode_next(sequence.images, sequence.num_stored)
        seconds = time.monotonic() - began
        self._served.ledger.count_features()
        self.begin(job, task)
        return seconds

    def end(self, task: Task) -> None:
        """The prompt is stored: its images are not looked at again."""
        assert task.prepared is not None
        assert task.sequence is not None
        if task.sequence.images is not None:
            task.sequence.images.features = {}
            self._served.ledger.reserve(task.key, task.prepared.needs.read)

    def begin_anew(self, job: Job, task: Task) -> None:
        """The sequence's caches are empty again, and what it holds of its images may be less than it has to read now.

        Raises: MemoryBudgetError when the memory was promised to others meanwhile.
        """
        sequence = task.sequence
        assert sequence is not None
        if sequence.images is None:
            return
        prepared = prepare(replace(task.request, grammar=None, grammar_after=None), self._served)
        assert prepared.images is not None
        if not self._served.ledger.reserve(job.key, prepared.needs.begin):
            raise MemoryBudgetError("a failed step left no memory to read the images again; retry")
        sequence.images, task.prepared = prepared.images, prepared
        self.begin(job, task)
