"""The far end of an upload: compares its stdin with a file and says when all of it was there.

Run over there by absolute path, with nothing but the standard library. It says ``ready``, then
``same N`` at the Nth byte, and goes on until the end of input, so that every process on the road
is still there to be asked for its CPU time.
"""

import mmap
import os
import sys


def main(path: str) -> None:
    with open(path, "rb") as file:
        wanted = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.write(1, b"ready\n")
    position = 0
    while data := os.read(0, 256 * 1024):
        if data != wanted[position : position + len(data)]:
            os.write(1, b"different near %d\n" % position)
            sys.exit(1)
        position += len(data)
        if position == len(wanted):
            os.write(1, b"same %d\n" % position)


main(sys.argv[1])
