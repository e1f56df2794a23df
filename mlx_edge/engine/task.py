"""A request inside the engine: what is known of it, from its arrival to its end."""

import math
from dataclasses import dataclass

from mlx_edge.engine.delivery import Sink
from mlx_edge.engine.intake import Prepared
from mlx_edge.engine.request import Request
from mlx_edge.engine.sequence import Sequence


@dataclass(eq=False)
class Task:
    """A request that was submitted and has not ended."""

    key: int
    request: Request
    sink: Sink
    whole: bool  # one piece with everything
    submitted: float
    prepared: Prepared | None = None  # None while it is prepared
    sequence: Sequence | None = None  # None until it is admitted

    @property
    def deadline(self) -> float:
        """When it ends with what there is."""
        limit = self.request.deadline_s
        return math.inf if limit is None else self.submitted + limit
