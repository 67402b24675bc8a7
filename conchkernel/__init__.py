"""SSH to any Jupyter."""
