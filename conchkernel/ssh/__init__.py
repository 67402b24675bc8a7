"""The SSH column: Conch, subclassed at every layer. Knows nothing of Jupyter."""
