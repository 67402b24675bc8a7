"""The pump and its compiled twin: the same answers for the same descriptors."""

from __future__ import annotations

import os
import termios
import threading

import pytest

from conchkernel.remote import pump

try:
    from conchkernel import _fastpty
except ImportError:  # no compiler here: the pure twin serves, and is what is tested
    TWINS = [pump.drain]
else:
    TWINS = [pump.drain, _fastpty.drain]
    assert _fastpty.ABI == pump.ABI


@pytest.fixture(params=TWINS, ids=lambda drain: drain.__module__.rpartition(".")[2])
def drain(request):
    """Each twin in turn."""
    return request.param


@pytest.fixture
def pipe():
    """A pipe with a non-blocking reading end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            pass


@pytest.fixture
def terminal():
    """A raw terminal: (master, slave)."""
    master, slave = os.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    os.set_blocking(master, False)
    yield master, slave
    for fd in (master, slave):
        try:
            os.close(fd)
        except OSError:
            pass


def raw(slave):
    """Every byte passes as it is."""
    attributes = termios.tcgetattr(slave)
    attributes[0] = attributes[1] = attributes[3] = 0
    termios.tcsetattr(slave, termios.TCSANOW, attributes)


def test_an_empty_pipe_gives_nothing(drain, pipe):
    """Nothing there is not the end."""
    assert drain(pipe[0], 100, False) == (b"", False)


def test_a_pipe_gives_what_it_holds_up_to_the_limit(drain, pipe):
    """Never more than the limit; the rest stays."""
    os.write(pipe[1], bytes(range(256)))
    assert drain(pipe[0], 100, False) == (bytes(range(100)), False)
    assert drain(pipe[0], 1000, False) == (bytes(range(100, 256)), False)


def test_a_pipes_end(drain, pipe):
    """The writer's close is the end, once all is read."""
    os.write(pipe[1], b"last")
    os.close(pipe[1])
    assert drain(pipe[0], 100, False) == (b"last", False)
    assert drain(pipe[0], 100, False) == (b"", True)


def test_a_terminal_is_emptied_in_one_call(drain, terminal):
    """Pieces written apart come as one batch."""
    for number in range(50):
        os.write(terminal[1], b"%d;" % number)
    assert drain(terminal[0], 65536, True) == (b"".join(b"%d;" % n for n in range(50)), False)
    assert drain(terminal[0], 65536, True) == (b"", False)


def test_a_terminal_respects_the_limit(drain, terminal):
    """A batch ends at the limit, byte for byte."""
    os.write(terminal[1], b"abcdefgh" * 10)
    assert drain(terminal[0], 3, True) == (b"abc", False)
    assert drain(terminal[0], 77, True) == ((b"abcdefgh" * 10)[3:], False)


def test_a_terminals_end_comes_behind_its_last_bytes(drain, terminal):
    """EIO is the end, not an error; what was written before it is delivered with it or first."""
    os.write(terminal[1], b"bye")
    os.close(terminal[1])
    data, ended = drain(terminal[0], 100, True)
    assert data == b"bye"
    if not ended:
        assert drain(terminal[0], 100, True) == (b"", True)


def test_a_flood_without_end_is_left(drain, terminal):
    """A terminal that fills as fast as it is read keeps nobody."""
    raw(terminal[1])

    def write():
        try:
            while True:
                os.write(terminal[1], bytes(65536))
        except OSError:
            pass  # the master is closed

    writer = threading.Thread(target=write)
    writer.start()
    limit = 1 << 26
    data, ended = b"", False
    while not data:
        data, ended = drain(terminal[0], limit, True)
    os.close(terminal[0])
    writer.join()
    assert not ended
    assert data == bytes(len(data))
    assert len(data) < limit


def test_a_flood_is_whole(drain, terminal):
    """A megabyte through a terminal, in batches, is the same megabyte."""
    data = os.urandom(1 << 20)
    raw(terminal[1])

    def write():
        left = memoryview(data)
        while left:
            left = left[os.write(terminal[1], left) :]
        os.close(terminal[1])

    writer = threading.Thread(target=write)
    writer.start()
    os.set_blocking(terminal[0], True)
    found, ended = bytearray(), False
    while not ended:
        piece, ended = drain(terminal[0], min(4096, len(data) - len(found)) or 1, True)
        found += piece
    writer.join()
    assert bytes(found) == data


def test_a_closed_descriptor_is_an_error_or_an_end(drain):
    """A pipe's trouble is raised; a terminal's is its end."""
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    with pytest.raises(OSError, match="Bad file"):
        drain(reading, 10, False)
    assert drain(reading, 10, True) == (b"", True)
