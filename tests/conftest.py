"""What all tests share: packed weights go to a folder of the run, not to the user's cache."""

import os
import tempfile

# Set before anything is imported, and inherited by the workers and by every process that a test starts.
os.environ.setdefault("MLX_EDGE_CACHE", tempfile.mkdtemp(prefix="mlx_edge_packed_"))
