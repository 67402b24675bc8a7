"""What runs on the kernel's host: sent there, standard library only, readable by its owner."""
