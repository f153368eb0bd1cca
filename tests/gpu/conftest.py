"""Tests that need an NVIDIA GPU: JAX_PLATFORMS=cuda python -m pytest tests/gpu.

Elsewhere they are not collected, so that a run without a GPU skips nothing.
"""

import os

collect_ignore_glob = []
if not os.environ.get("JAX_PLATFORMS", "").startswith("cuda"):
  collect_ignore_glob.append("test_*.py")
