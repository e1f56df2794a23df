"""What images take in memory: the tower's weights, the patches of an image, the tower's activations, features.

Arithmetic from the sizes of a tower; nothing is loaded. For the CPU kernels the activations were measured
(`bench/vision_memory.py`), elsewhere they are an estimate. Sizes are in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_edge.engine.memory.weight_sizes import Backend, WeightSizes
from mlx_edge.models.vision.config import VisionConfig
from mlx_edge.models.vision.processor import ProcessorConfig, resized_size
from mlx_edge.models.vision.tower import LARGE
from mlx_edge.ops.reference_attention import SCORE_ELEMENTS

FLOAT_BYTES = 4  # of a patch's numbers, and of what the tower computes on a CPU
# Convolutions are left to MLX's own products, and these to BLAS, which keeps memory for each of its threads.
BLAS_BYTES = 64 << 20
MAX_ROOM_BYTES = 256 << 20  # for patches of requests that wait
SIDE = 1 << 14  # pixels along each side of an image larger than any limit


@dataclass(frozen=True)
class VisionSizes:
    """A tower, and what its images take."""

    config: VisionConfig
    processor: ProcessorConfig
    weights: WeightSizes  # part of the model's
    backend: Backend

    @property
    def room_bytes(self) -> int:
        """Patches of requests that wait: as many as there is room for."""
        return min(MAX_ROOM_BYTES, 4 * self.patch_bytes(self.largest_image()))

    def largest_image(self, max_pixels: int | None = None) -> int:
        """The patches of the largest image that the tower's processor, or `max_pixels`, lets pass."""
        height, width = resized_size(SIDE, SIDE, self.processor, max_pixels)
        return height * width // self.config.patch_size**2

    def count_tokens(self, patches: int) -> int:
        """The tokens that they are in a prompt."""
        return patches // self.config.merge_unit

    def patch_bytes(self, patches: int) -> int:
        """An image's pixels, as the tower reads them."""
        return FLOAT_BYTES * self.config.patch_values * patches

    def feature_bytes(self, patches: int) -> int:
        """What the tower makes of them."""
        return self._float_bytes * self.config.out_size * self.count_tokens(patches)

    def tower_bytes(self, patches: int) -> int:
        """What the tower takes while it runs, beside weights, patches and features.

        Of a large image all patches are held as they go in and out of a block and as heads; what is made of them on
        the way has at most LARGE rows at a time.
        """
        config = self.config
        size, inner = config.hidden_size, config.intermediate_size
        held = max(8 * size, config.patch_values + 3 * size)
        merged = 2 * size + (3 * config.merger_size + 3 * config.out_size) // config.merge_unit
        made = 8 * size + max(4 * inner, merged)
        floats = patches * held + min(patches, LARGE) * made
        if self.backend == "plain":
            floats += 3 * min(SCORE_ELEMENTS, config.num_heads * patches**2)
        return self._float_bytes * floats + BLAS_BYTES * (self.backend != "metal")

    def encoding_bytes(self, images: Sequence[int]) -> int:
        """All that images of so many patches each need until the last of them is encoded."""
        held = sum(self.patch_bytes(patches) + self.feature_bytes(patches) for patches in images)
        return held + self.tower_bytes(max(images, default=0))

    @property
    def _float_bytes(self) -> int:
        return 2 if self.backend == "metal" else FLOAT_BYTES
