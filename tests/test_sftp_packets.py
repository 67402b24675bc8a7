"""SFTP's packets, from bytes and to bytes."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conchkernel.errors import LinkLost
from conchkernel.files import Attributes, FileProblem, FileStoreError, Filesystem
from conchkernel.ssh import sftp_packets as packets
from conchkernel.ssh.fields import Fields, ProtocolError, string
from conchkernel.ssh.sftp_longname import longname
from conchkernel.ssh.sftp_packets import MALFORMED, Kind, RequestReader, Status, frame
from conchkernel.ssh.sftp_status import CODES, statusOf

from .sftpclient import uint32, uint64

INIT = frame(Kind.INIT, 3, b"")


def read(data: bytes, step: int = 1 << 20) -> list[packets.Request]:
    """All requests of a stream that comes in pieces."""
    reader = RequestReader()
    found = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        while (request := reader.next()) is not None:
            found.append(request)
    assert reader.taken == len(data)
    return found


def one(kind: int, *fields: bytes) -> packets.Request:
    """One request, after INIT."""
    return read(INIT + frame(kind, 7, b"".join(fields)))[1]


STREAM = INIT + b"".join(
    frame(kind, number, b"".join(fields))
    for number, (kind, fields) in enumerate(
        [
            (Kind.OPEN, (string(b"/a"), uint32(3), uint32(0))),
            (Kind.WRITE, (string(b"h"), uint64(5), string(b"x" * 3000))),
            (Kind.READ, (string(b"h"), uint64(1 << 40), uint32(32768))),
            (Kind.CLOSE, (string(b"h"),)),
            (99, (b"whatever",)),
            (Kind.EXTENDED, (string(b"nonsense"), b"more")),
            (Kind.STAT, (uint32(100), b"short")),
            (Kind.WRITE, (string(b"h"), uint64(5), uint32(9), b"short")),
        ]
    )
)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100, 4096])
def test_anyFragmentation(step: int) -> None:
    """The same requests, however the stream is cut."""
    requests = read(STREAM, step)
    assert requests == read(STREAM)
    assert [request[0] for request in requests] == [
        Kind.INIT, Kind.OPEN, Kind.WRITE, Kind.READ, Kind.CLOSE, 99, packets.UNKNOWN_EXTENSION,
        MALFORMED, MALFORMED,
    ]  # fmt: skip
    assert requests[2] == (Kind.WRITE, 1, (b"h", 5, b"x" * 3000))
    assert requests[3] == (Kind.READ, 2, (b"h", 1 << 40, 32768))


def test_bytesAfterTheLastFieldAreTolerated() -> None:
    """rclone sends what was in its buffer."""
    assert one(Kind.WRITE, string(b"h"), uint64(0), string(b"data"), b"stale" * 1000)[2] == (
        b"h", 0, b"data",
    )  # fmt: skip
    assert one(Kind.STAT, string(b"/a"), b"stale") == (Kind.STAT, 7, (b"/a",))


@pytest.mark.parametrize("length", [0, 1, 4, 256 * 1024 + 1025, 0xFFFFFFFF])
def test_lengthsThatCannotBe(length: int) -> None:
    """Told from the first four bytes, before anything is kept."""
    reader = RequestReader()
    reader.feed(INIT + uint32(length))
    assert reader.next() is not None
    with pytest.raises(ProtocolError):
        reader.next()


def test_largestRequest() -> None:
    """A WRITE of what limits@openssh.com allows, and of some more."""
    data = b"x" * (256 * 1024 + 1024 - 9 - 4 - 16 - 8 - 4 + 4)
    assert one(Kind.WRITE, string(b"h" * 16), uint64(0), string(data))[2][2] == data


def test_nothingBeforeINIT() -> None:
    """As with sftp-server, the session cannot go on."""
    reader = RequestReader()
    reader.feed(frame(Kind.STAT, 1, string(b"/")))
    with pytest.raises(ProtocolError, match="before INIT"):
        reader.next()


def test_manySmallRequestsCostNoMoreThanTheirBytes() -> None:
    """A window full of requests that are begun one by one is not moved at each of them."""
    reader = RequestReader()
    reader.feed(INIT + frame(Kind.STAT, 1, string(b"/")) * 150_000)
    moved, last = 0, 0
    while reader.next() is not None:
        if reader._offset < last:
            moved += len(reader._buffer)
        last = reader._offset
    assert moved < 150_000 * 14 * 2


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.INIT, Kind.EXTENDED)])
@pytest.mark.parametrize("body", [b"", b"\0\0\0", uint32(0xFFFFFFFF), string(b"x")[:-1]])
def test_truncatedRequestsHaveAnId(kind: Kind, body: bytes) -> None:
    """So that they can be answered."""
    what, number, arguments = one(kind, body)
    assert number == 7
    assert (what == MALFORMED and isinstance(arguments[0], str)) or arguments == ()


def test_pathsWithNUL() -> None:
    """No file has such a name, and no system call takes one."""
    assert one(Kind.STAT, string(b"/a\0b"))[0] == MALFORMED


def test_init() -> None:
    """Any version, with any extensions, more than once."""
    data = frame(Kind.INIT, 6, string(b"ext") + string(b"1")) + INIT
    assert read(data) == [(Kind.INIT, 6, ()), (Kind.INIT, 3, ())]


ATTRIBUTES = st.builds(
    Attributes,
    size=st.none() | st.integers(0, 2**64 - 1),
    mode=st.none() | st.integers(0, 2**32 - 1),
)


@given(
    ATTRIBUTES, st.none() | st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    st.none() | st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
)  # fmt: skip
def test_attributesThereAndBack(
    value: Attributes, owners: tuple[int, int] | None, times: tuple[int, int] | None
) -> None:
    """All combinations of what may be missing."""
    uid, gid = owners or (None, None)
    atime, mtime = times or (None, None)
    value = Attributes(value.size, uid, gid, value.mode, atime, mtime)
    fields = Fields(packets.packAttributes(value), "attributes")
    assert packets.parseAttributes(fields) == value
    fields.end()


def test_extendedAttributes() -> None:
    """Pairs of other people's are skipped; a count that lies is an error, and soon."""
    pairs = string(b"a@b") + string(b"c")
    fields = Fields(uint32(0x80000004) + uint32(0o644) + uint32(2) + pairs * 2, "attributes")
    assert packets.parseAttributes(fields) == Attributes(mode=0o644)
    fields.end()
    with pytest.raises(ProtocolError):
        packets.parseAttributes(Fields(uint32(0x80000000) + uint32(2**32 - 1) + pairs, "x"))


@pytest.mark.parametrize(
    ("when", "told"),
    [(-5.0, 0), (1.9, 1), (1e30, 2**32 - 1), (float("inf"), 2**32 - 1), (float("nan"), 0)],
)
def test_timesThatVersion3CannotSay(when: float, told: int) -> None:
    """Before 1970 and after 2106: the nearest."""
    packed = packets.packAttributes(Attributes(mtime=when))
    assert struct.unpack(">3L", packed) == (8, told, told)


def test_filesystem() -> None:
    """In the order of statvfs@openssh.com."""
    kind, rest = packets.filesystem(Filesystem(*range(1, 12)))
    assert (kind, struct.unpack(">11Q", rest)) == (Kind.EXTENDED_REPLY, tuple(range(1, 12)))


def test_accountsThatDoNotFit() -> None:
    """One answer for each id, and never a packet that is too long."""
    kind, rest = packets.accounts(["x" * 1000] * packets.MAX_ACCOUNTS, [""] * 3)
    assert len(frame(kind, 1, rest)) <= packets.MAX_PACKET_BYTES
    users, groups = Fields(rest, "x"), None
    users, groups = Fields(users.string(), "users"), Fields(users.string(), "groups")
    names = [users.string() for _ in range(packets.MAX_ACCOUNTS)]
    users.end()
    assert (names[0], names[-1]) == (b"x" * 1000, b"")
    assert [groups.string() for _ in range(3)] == [b""] * 3


# --- long names ------------------------------------------------------------------------------

NOW = 1_700_000_000.0


def test_longname(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sftp-server's: columns, names of accounts, the year of what is old."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    value = Attributes(
        size=12345, mode=0o100644, uid=7, gid=8, mtime=NOW - 86400, owner="joe", group="users",
        links=2,
    )  # fmt: skip
    line = b"-rw-r--r--   2 joe      users       12345 Nov 13 22:13 a \xff b"
    assert longname(b"a \xff b", value, NOW) == line
    old = Attributes(mode=0o040755, uid=7, gid=8, mtime=0.0)
    assert longname(b"d", old, NOW) == b"drwxr-xr-x   1 7        8               0 Jan  1  1970 d"
    assert longname(b"x", Attributes(), NOW).startswith(b"??????????   1 ?        ?  ")
    assert b" 2106" in longname(b"x", Attributes(mtime=2.0**32), NOW)
    assert longname(b"x", Attributes(mtime=1e300), NOW).endswith(b" x")
    monkeypatch.undo()
    time.tzset()


# --- errors ----------------------------------------------------------------------------------


def test_everyProblemHasACode() -> None:
    """One of version 3's, and the sentence with it."""
    assert set(CODES) == set(FileProblem)
    for problem in FileProblem:
        kind, rest = statusOf(FileStoreError(problem, "a sentence")) or (0, b"")
        assert kind == Kind.STATUS
        assert rest == uint32(CODES[problem]) + string(b"a sentence") + string(b"")


def test_otherErrors() -> None:
    """A lost road has a code of its own; a mistake of ours has none."""
    assert (statusOf(LinkLost("gone")) or (0, b""))[1][:4] == uint32(Status.CONNECTION_LOST)
    assert statusOf(ValueError("x")) is None
    long = statusOf(FileStoreError(FileProblem.FAILURE, "\udcff" + "x" * 100_000))
    assert long is not None
    assert len(long[1]) < 2000
