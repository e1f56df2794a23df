"""What the tower makes of images: computed one image at a time, kept by content for the next request that shows it.

Two prompts that show the same screenshot behind different texts pay for the tower once. The least recently used
features go first. To be used by the one thread that runs the model; knows no requests and no scheduling.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_edge.decoding.loop import explained
from mlx_edge.models.vision.prompt import ImagePrompt, encode_images
from mlx_edge.models.vision.tower import VisionTower


class ImageFeatures:
    """Features (num_tokens, E) of a tower by content, of at most `limit_bytes` together."""

    def __init__(self, tower: VisionTower, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._tower = tower
        self._features: dict[bytes, mx.array] = {}  # the least recently used first
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that they take, those that sequences use too included."""
        return self._nbytes

    def find(self, images: ImagePrompt, begin: int) -> bool:
        """Take what is kept for the positions from `begin`; whether nothing is left to be computed there."""
        for span in images.missing(begin, _length(images, begin)):
            features = self._features.pop(span.patches.content, None)
            if features is not None:
                self._features[span.patches.content] = images.features[span.patches.content] = (
                    features
                )
        return not images.missing(begin, _length(images, begin))

    @explained()
    def encode_next(self, images: ImagePrompt, begin: int) -> None:
        """Run the tower on the first image there that has no features; they are kept."""
        span = images.missing(begin, _length(images, begin))[0]
        encode_images(self._tower, images, span.start, span.num_tokens)
        self._keep(span.patches.content, images.features[span.patches.content])

    def evict(self, nbytes: int) -> int:
        """Let go of `nbytes` if there are so many, the least recently used first; returns what it was."""
        before = self._nbytes
        while self._features and before - self._nbytes < nbytes:
            oldest = next(iter(self._features))
            self._nbytes -= self._features.pop(oldest).nbytes
        return before - self._nbytes

    def _keep(self, content: bytes, features: mx.array) -> None:
        if features.nbytes > self.limit_bytes or content in self._features:
            return
        self.evict(self._nbytes + features.nbytes - self.limit_bytes)
        self._features[content] = features
        self._nbytes += features.nbytes


def drop_pixels(images: ImagePrompt) -> None:
    """Forget the patches of images whose features are there or not needed; their content and size stay."""
    images.spans = tuple(
        replace(span, patches=replace(span.patches, values=np.empty((0, 0), np.float32)))
        for span in images.spans
    )


def _length(images: ImagePrompt, begin: int) -> int:
    return max(0, len(images.tokens) - begin)
