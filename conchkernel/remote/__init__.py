"""What runs on the kernel's host: standard library only, sent there, readable by its administrator."""
