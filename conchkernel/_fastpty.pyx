# cython: language_level=3, boundscheck=False, wraparound=False
"""The compiled twin of :mod:`conchkernel.remote.pump`: one buffer, read without the GIL.

A terminal gives its bytes in pieces of some KiB; here they are read straight behind each other into
one buffer, so that a batch costs one object and no joining.
"""

from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdlib cimport free, malloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport read

import os

#: As in :mod:`conchkernel.remote.pump`.
ABI = 2

# Reads below this size go to the stack: a key needs no allocation of a batch.
cdef enum:
    FIRST = 4096
    TERMINAL_NANOSECONDS = 500_000  # TERMINAL_SECONDS there


cdef Py_ssize_t _read(int fd, char *buffer, size_t size, int *error) noexcept nogil:
    """read(2), again after EINTR; -1 and ``error`` where it fails."""
    cdef Py_ssize_t count
    while True:
        count = read(fd, buffer, size)
        if count >= 0:
            return count
        if errno != EINTR:
            error[0] = errno
            return -1


cdef long long _now() noexcept nogil:
    """Nanoseconds."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <long long> now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef Py_ssize_t _drain(
    int fd, char *buffer, size_t limit, size_t filled, int *error, int *ended
) noexcept nogil:
    """Read until there is nothing more, the end, the limit, or it is late; returns what is in the
    buffer."""
    cdef Py_ssize_t count
    cdef long long until = _now() + TERMINAL_NANOSECONDS
    while filled < limit and _now() < until:
        count = _read(fd, buffer + filled, limit - filled, error)
        if count > 0:
            filled += count
            continue
        if count == 0 or error[0] == EIO:
            ended[0] = 1
        elif error[0] != EAGAIN:
            ended[0] = 1
        break
    return filled


# --- Public API ------------------------------------------------------------------------------


def drain(int fd, Py_ssize_t limit, bint terminal):
    """See :func:`conchkernel.remote.pump.drain`: same arguments, same answers, same errors."""
    cdef char first[FIRST]
    cdef char *batch
    cdef Py_ssize_t count
    cdef int error = 0
    cdef int ended = 0
    cdef bytes data
    if limit <= 0:
        raise ValueError("limit must be positive")
    if not terminal:
        return _drain_pipe(fd, limit)
    with nogil:
        count = _read(fd, first, min(limit, <Py_ssize_t> FIRST), &error)
    if count < 0:
        if error == EAGAIN:
            return b"", False
        return b"", True
    if count == 0:
        return b"", True
    if count == limit:
        return PyBytes_FromStringAndSize(first, count), False
    batch = <char *> malloc(limit)
    if batch == NULL:
        raise MemoryError()
    try:
        with nogil:
            for i in range(count):
                batch[i] = first[i]
            count = _drain(fd, batch, limit, count, &error, &ended)
        data = PyBytes_FromStringAndSize(batch, count)
    finally:
        free(batch)
    return data, ended != 0


cdef tuple _drain_pipe(int fd, Py_ssize_t limit):
    cdef int error = 0
    cdef Py_ssize_t count
    cdef bytes data = PyBytes_FromStringAndSize(NULL, limit)
    cdef char *buffer = PyBytes_AsString(data)
    with nogil:
        count = _read(fd, buffer, limit, &error)
    if count < 0:
        if error == EAGAIN:
            return b"", False
        raise OSError(error, os.strerror(error))
    if count == 0:
        return b"", True
    return data[:count], False
