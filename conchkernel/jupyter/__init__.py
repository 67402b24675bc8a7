"""The kernel column: roads to the host of a Jupyter kernel. Knows nothing of SSH."""
