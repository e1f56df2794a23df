"""What all tests share: packed weights go to a folder of the run, not to the user's cache; Ctrl-C reaches processes."""

import atexit
import os
import shutil
import signal
import tempfile

# Set before anything is imported, and inherited by the workers and by every process that a test starts.
if "MLX_EDGE_CACHE" not in os.environ:
    os.environ["MLX_EDGE_CACHE"] = tempfile.mkdtemp(prefix="mlx_edge_packed_")
    atexit.register(shutil.rmtree, os.environ["MLX_EDGE_CACHE"], ignore_errors=True)

# A shell that runs the tests in the background has them ignore Ctrl-C, and every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
