"""The agent's file service by itself: two endpoints in memory, real files, and an attacker."""

from __future__ import annotations

import errno
import os
import queue
import stat
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from conchkernel import frames, wire, wirestream
from conchkernel.files import FileProblem
from conchkernel.remote import files as module
from conchkernel.remote import filewire as fw
from conchkernel.remote.files import CannotServe, FileService
from conchkernel.remote.paths import Jail

PATIENCE_SECONDS = 20
NOTHING = fw.ATTRIBUTES.pack(0, 0, fw.SAME, fw.SAME, 0, 0, 0, 0)
READ, WRITE, CREATE = fw.OPEN_READ, fw.OPEN_WRITE, fw.OPEN_CREATE


class Conversation:
    """A gateway's endpoint and an agent's, and the service at the latter; also its agent.

    :param granted: how many bytes of answers the gateway takes at first.
    """

    def __init__(self, start, granted=2**40, **parameters):
        self.options = {"directory": str(start)}
        self.posted = queue.SimpleQueue()
        self.service = None
        self.heard = bytearray()
        self.info = self.refused = self.reason = None
        self.closed = False
        self._last = 0
        self.gateway = wire.Endpoint()
        self.agent = wire.Endpoint(opened=self._opened)
        asked = {
            name: value.decode("latin-1") if isinstance(value, bytes) else value
            for name, value in parameters.items()
        }
        self.stream = self.gateway.open({"kind": "files", **asked}, self)
        self.stream.grant(granted)
        self.pump()

    def _opened(self, stream, parameters):
        try:
            self.service = FileService(self, self, stream, parameters)
        except CannotServe as error:
            wirestream.refuse(stream, 4, str(error))
        else:
            stream.receiver = self.service

    # What the service asks of an agent.

    def post(self, callback):
        self.posted.put(callback)

    def settle(self, session):
        pass

    # The gateway's receiver.

    def wire_opened(self, info):
        self.info = info

    def wire_refused(self, code, message):
        self.refused = message

    def wire_data(self, data, extended):
        self.heard += data

    def wire_closed(self, reason):
        self.closed, self.reason = True, reason

    def wire_sent(self, count):
        pass

    def wire_credit(self):
        pass

    # What tests do.

    def pump(self):
        """Carry what there is to carry."""
        moved = True
        while moved:
            moved = False
            for sender, receiver in ((self.gateway, self.agent), (self.agent, self.gateway)):
                while (message := sender.next_message()) is not None:
                    receiver.receive(b"".join(message), 0.0)
                    moved = True

    def wait(self, done):
        """Carry on until ``done()``."""
        self.pump()
        while not done():
            self.posted.get(timeout=PATIENCE_SECONDS)()
            self.pump()

    def send(self, operation, *parts):
        """A request; returns its id."""
        self._last += 1
        body = b"".join(parts)
        self.stream.write(fw.HEAD.pack(fw.COUNTED + len(body), self._last, operation) + body)
        return self._last

    def answer(self):
        """The next answer: id, problem's name, body."""
        heard = self.heard

        def whole():
            return len(heard) >= 4 and len(heard) >= 4 + struct.unpack_from(">I", heard)[0]

        self.wait(lambda: whole() or self.closed)
        assert whole(), self.reason
        length, request, problem = fw.HEAD.unpack_from(heard)
        body = bytes(heard[fw.HEAD.size : 4 + length])
        del heard[: 4 + length]
        return request, fw.PROBLEMS[problem], body

    def ask(self, operation, *parts):
        """A request and its answer: problem's name, body."""
        asked = self.send(operation, *parts)
        request, problem, body = self.answer()
        assert request == asked
        return problem, body

    def open(self, path, flags, handle=1):
        """OPEN; the problem's name."""
        return self.ask(fw.OPEN, fw.OPEN_HEAD.pack(handle, flags), NOTHING, path)[0]

    def read(self, handle=1, offset=0, length=1000):
        return self.ask(fw.READ, fw.READ_BODY.pack(handle, offset, length))

    def content(self, path):
        """What a path leads to, or why not."""
        problem = self.open(path, READ, 77)
        if problem:
            return problem
        problem, body = self.read(77)
        assert self.ask(fw.CLOSE, fw.HANDLE.pack(77))[0] == ""
        return problem or body

    def end(self):
        """Close from the gateway, and wait for the thread."""
        if not self.closed:
            self.stream.close()
            self.pump()
        if self.service is not None:
            while not self.service._exchange.finished or not self.posted.empty():
                self.posted.get(timeout=PATIENCE_SECONDS)()


@pytest.fixture
def converse(tmp_path):
    """Makes conversations; afterwards nothing of them is open."""
    made = []
    descriptors = set(os.listdir("/proc/self/fd"))
    running = FileService.running

    def make(**parameters):
        made.append(Conversation(tmp_path, **parameters))
        return made[-1]

    yield make
    for conversation in made:
        conversation.end()
    assert FileService.running == running
    assert set(os.listdir("/proc/self/fd")) <= descriptors


def test_numbers_of_problems_are_the_stores():
    """Every problem on the wire has a name among the store's problems; the stores' own is local."""
    local = {FileProblem.CONNECTION_LOST}
    assert {FileProblem[name] for name in fw.PROBLEMS if name} == set(FileProblem) - local


def test_opened_tells_where_and_what(converse, tmp_path):
    """OPENED tells home and features."""
    talk = converse()
    assert talk.info["home"] == str(tmp_path)
    assert set(talk.info["features"]) >= {"modes", "offset-writes"}


def test_requests_are_done_in_order_without_waiting(converse, tmp_path):
    """Open, write, fsync, close, rename and stat go together and are done one after another."""
    talk = converse()
    path, final = os.fsencode(tmp_path / "part"), os.fsencode(tmp_path / "whole")
    handle = fw.HANDLE.pack(9)
    sent = [
        talk.send(fw.OPEN, fw.OPEN_HEAD.pack(9, WRITE | CREATE), NOTHING, path),
        talk.send(fw.WRITE, fw.WRITE_HEAD.pack(9, 3), b"def"),
        talk.send(fw.WRITE, fw.WRITE_HEAD.pack(9, 0), b"abc"),
        talk.send(fw.FSYNC, handle),
        talk.send(fw.CLOSE, handle),
        talk.send(fw.RENAME, b"\1", fw.U16.pack(len(path)), path, final),
        talk.send(fw.STAT, final),
    ]
    answers = [talk.answer() for _ in sent]
    assert [(request, problem) for request, problem, _ in answers] == [(n, "") for n in sent]
    assert fw.ATTRIBUTES.unpack(answers[-1][2])[1] == 6
    assert (tmp_path / "whole").read_bytes() == b"abcdef"


def test_records_may_be_cut_anywhere(converse, tmp_path):
    """One byte a frame is as good as one frame."""
    (tmp_path / "file").write_bytes(b"content")
    talk = converse()
    body = fw.OPEN_HEAD.pack(1, READ) + NOTHING + os.fsencode(tmp_path / "file")
    record = fw.HEAD.pack(fw.COUNTED + len(body), 1, fw.OPEN) + body
    record += fw.HEAD.pack(fw.COUNTED + fw.READ_BODY.size, 2, fw.READ)
    record += fw.READ_BODY.pack(1, 3, 100)
    for index in range(len(record)):
        talk.stream.write(record[index : index + 1])
        talk.pump()
    assert talk.answer()[:2] == (1, "")
    assert talk.answer() == (2, "", b"tent")


@pytest.mark.parametrize(
    "record",
    [
        struct.pack(">I", 0) + bytes(16),
        struct.pack(">I", 4) + bytes(16),
        struct.pack(">I", fw.MAX_RECORD + 1) + bytes(16),
        struct.pack(">I", 0xFFFFFFFF) + bytes(16),
        *(fw.HEAD.pack(fw.COUNTED, 1, operation) for operation in (
            fw.OPEN, fw.CLOSE, fw.READ, fw.WRITE, fw.FSTAT, fw.FSETSTAT, fw.FSYNC, fw.FSTATVFS,
            fw.SETSTAT, fw.LSETSTAT, fw.OPENDIR, fw.READDIR, fw.MKDIR, fw.RENAME, fw.SYMLINK,
            fw.LINK, fw.NAMES, fw.COPY,
        )),
        fw.HEAD.pack(fw.COUNTED + 3, 1, fw.LINK) + b"\xff\xffx",
        fw.HEAD.pack(fw.COUNTED + 4, 1, fw.NAMES) + b"\xff\xff\xff\xff",
        fw.HEAD.pack(fw.COUNTED + 12, 1, fw.COPY) + bytes(12),
    ],
)  # fmt: skip
def test_malformed_requests_end_their_stream(converse, record):
    """Hostile lengths and short bodies are no answer's business: the stream is closed."""
    talk = converse()
    talk.stream.write(record)
    talk.wait(lambda: talk.closed)
    assert "malformed" in talk.reason


def test_the_first_request_may_be_the_longest(converse):
    """There is credit for it from the beginning."""
    talk = converse()
    assert talk.ask(fw.STAT, b"/" * (fw.MAX_RECORD - fw.COUNTED))[0] == "NAME_TOO_LONG"


def test_the_longest_requests_beside_typing(converse, tmp_path):
    """While somebody types less is let on the road at once than one of them has; each gets done."""
    talk = converse()
    path = os.fsencode(tmp_path / "file")
    assert talk.open(path, WRITE | CREATE) == ""
    talk.agent.typed_at = float("inf")
    assert talk.agent.streams[talk.stream.id].cap < fw.MAX_TRANSFER
    for index in range(12):
        head = fw.WRITE_HEAD.pack(1, index * fw.MAX_TRANSFER)
        talk.send(fw.WRITE, head, bytes([index]) * fw.MAX_TRANSFER)
    assert [talk.answer()[1] for _ in range(12)] == [""] * 12
    expected = b"".join(bytes([index]) * fw.MAX_TRANSFER for index in range(12))
    assert (tmp_path / "file").read_bytes() == expected


def test_a_handle_twice_is_a_violation(converse, tmp_path):
    """A number in use cannot be opened again."""
    (tmp_path / "file").touch()
    talk = converse()
    assert talk.open(b"file", READ) == ""
    talk.send(fw.OPENDIR, fw.HANDLE.pack(1), os.fsencode(tmp_path))
    talk.wait(lambda: talk.closed)
    assert "in use" in talk.reason


@pytest.mark.parametrize(
    ("size", "flags", "whole"),
    [
        (1, READ, True),
        (fw.MAX_AHEAD, READ, True),
        (0, READ, False),
        (fw.MAX_AHEAD + 1, READ, False),
        (1, READ | WRITE, False),
    ],
)
def test_small_files_come_with_their_open(converse, tmp_path, size, flags, whole):
    """Attributes and all bytes, of what is opened for reading alone; else the answer is empty."""
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    there = converse()
    head = fw.OPEN_HEAD.pack(1, flags)
    problem, body = there.ask(fw.OPEN, head, NOTHING, os.fsencode(tmp_path / "file"))
    assert problem == ""
    if whole:
        assert fw.ATTRIBUTES.unpack_from(body)[1] == size
        assert body[fw.ATTRIBUTES.size :] == data
    else:
        assert body == b""
    assert there.read(1, 0, 100) == ("", data[:100])


def write_last(talk, data, offset=0):
    return talk.ask(fw.WRITE_LAST, fw.WRITE_HEAD.pack(1, offset), data)


def test_the_last_write_closes_the_file(converse, tmp_path):
    """For everybody else it is closed: what was written can be run before its CLOSE."""
    talk = converse()
    mode = fw.ATTRIBUTES.pack(fw.HAS_MODE, 0, 0, 0, 0o700, 0, 0, 0)
    head = fw.OPEN_HEAD.pack(1, WRITE | CREATE)
    assert talk.ask(fw.OPEN, head, mode, b"program")[0] == ""
    assert write_last(talk, Path("/bin/true").read_bytes()) == ("", b"\1")
    assert subprocess.run([tmp_path / "program"], check=False).returncode == 0
    assert talk.ask(fw.CLOSE, fw.HANDLE.pack(1)) == ("", b"")


@pytest.mark.parametrize("meanwhile", ["nothing", "renamed", "removed", "replaced"])
def test_a_handle_goes_on_after_its_last_write(converse, tmp_path, meanwhile):
    """It is of the same file, whatever has become of the name."""
    talk, path = converse(), tmp_path / "file"
    assert talk.open(b"file", READ | WRITE | CREATE) == ""
    assert write_last(talk, b"content") == ("", b"\1")
    inode = path.stat().st_ino
    if meanwhile == "renamed":
        path.rename(tmp_path / "other")
    elif meanwhile == "removed":
        path.unlink()
    elif meanwhile == "replaced":
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").rename(path)
    assert talk.read() == ("", b"content")
    assert talk.ask(fw.WRITE, fw.WRITE_HEAD.pack(1, 7), b" and more")[0] == ""
    assert write_last(talk, b"!", 16) == ("", b"\1")
    assert talk.ask(fw.FSYNC, fw.HANDLE.pack(1))[0] == ""
    assert talk.ask(fw.FSETSTAT, fw.HANDLE.pack(1), sized(12))[0] == ""
    assert talk.read() == ("", b"content and ")
    assert talk.ask(fw.CLOSE, fw.HANDLE.pack(1))[0] == ""
    left = {one.stat().st_ino: one.read_bytes() for one in tmp_path.iterdir()}
    assert left.get(inode, b"content and ") == b"content and "
    if meanwhile == "replaced":
        assert path.read_bytes() == b"new"


def sized(size):
    return fw.ATTRIBUTES.pack(fw.HAS_SIZE, size, 0, 0, 0, 0, 0, 0)


def test_appending_goes_on_after_the_last_write(converse, tmp_path):
    """At the end, as before."""
    (tmp_path / "file").write_bytes(b"one")
    talk = converse()
    assert talk.open(b"file", WRITE | fw.OPEN_APPEND) == ""
    assert write_last(talk, b"two") == ("", b"\1")
    with (tmp_path / "file").open("ab") as other:
        other.write(b"three")
    assert talk.ask(fw.WRITE, fw.WRITE_HEAD.pack(1, 0), b"four")[0] == ""
    assert (tmp_path / "file").read_bytes() == b"onetwothreefour"


def test_what_could_not_be_opened_again_stays_open(converse, tmp_path):
    """A file that may not be written any more, and what is no file."""
    talk = converse()
    mode = fw.ATTRIBUTES.pack(fw.HAS_MODE, 0, 0, 0, 0o400, 0, 0, 0)
    assert talk.ask(fw.OPEN, fw.OPEN_HEAD.pack(1, WRITE | CREATE), mode, b"file")[0] == ""
    assert write_last(talk, b"content") == ("", b"\0")
    assert write_last(talk, b"C") == ("", b"\0")
    assert (tmp_path / "file").read_bytes() == b"Content"
    assert talk.ask(fw.CLOSE, fw.HANDLE.pack(1))[0] == ""
    assert talk.open(b"/dev/null", WRITE) == ""
    assert write_last(talk, b"content") == ("", b"\0")


def test_a_last_write_that_fails(converse, tmp_path):
    """It says so, and the handle is as it was."""
    talk = converse()
    assert talk.open(b"/dev/full", WRITE) == ""
    assert write_last(talk, b"content")[0] == "NO_SPACE"
    assert talk.ask(fw.CLOSE, fw.HANDLE.pack(1))[0] == ""
    (tmp_path / "file").touch()
    assert talk.open(b"file", READ) == ""
    assert write_last(talk, b"content")[0] == "PERMISSION"
    assert (
        converse(read_only=True).ask(fw.WRITE_LAST, fw.WRITE_HEAD.pack(1, 0), b"x")[0]
        == "READ_ONLY"
    )


def test_unknown_operations_and_handles_are_answered(converse, tmp_path):
    """They concern nobody else."""
    talk = converse()
    assert talk.ask(99, b"whatever")[0] == "UNSUPPORTED"
    assert talk.read(5)[0] == "INVALID"
    assert talk.ask(fw.CLOSE, fw.HANDLE.pack(5))[0] == "INVALID"
    assert talk.ask(fw.OPENDIR, fw.HANDLE.pack(5), os.fsencode(tmp_path))[0] == ""
    assert talk.read(5)[0] == "INVALID", "a directory is no file"
    assert talk.ask(fw.STAT, b"a\0b")[0] == "INVALID"
    assert talk.ask(fw.STAT, b"")[0] == "NOT_FOUND"


def test_handles_are_limited_and_come_back(converse, tmp_path):
    """One more is refused; closing one makes room."""
    (tmp_path / "file").touch()
    talk = converse()
    for handle in range(fw.MAX_HANDLES):
        assert talk.open(b"file", READ, handle) == ""
    problem, text = talk.ask(fw.OPEN, fw.OPEN_HEAD.pack(1000, READ), NOTHING, b"file")
    assert (problem, text) == ("FAILURE", b"too many files are open")
    assert talk.ask(fw.CLOSE, fw.HANDLE.pack(3))[0] == ""
    assert talk.open(b"file", READ, 1000) == ""


def test_offsets_beyond_the_system_are_invalid(converse, tmp_path):
    """2**63 and more fit no off_t; nobody falls over."""
    (tmp_path / "file").touch()
    talk = converse()
    assert talk.open(b"file", READ | WRITE) == ""
    assert talk.read(offset=2**64 - 1)[0] == "INVALID"
    assert talk.read(offset=2**63)[0] == "INVALID"
    problem, _ = talk.ask(fw.WRITE, fw.WRITE_HEAD.pack(1, 2**63), b"x")
    assert problem == "INVALID"
    size = fw.ATTRIBUTES.pack(fw.HAS_SIZE, 2**63, 0, 0, 0, 0, 0, 0)
    assert talk.ask(fw.FSETSTAT, fw.HANDLE.pack(1), size)[0] == "INVALID"
    times = fw.ATTRIBUTES.pack(fw.HAS_TIMES, 0, 0, 0, 0, -(2**63), 2**63 - 1, 0)
    assert talk.ask(fw.FSETSTAT, fw.HANDLE.pack(1), times)[0] in ("", "INVALID")


def test_nothing_is_read_without_credit(converse, tmp_path):
    """A client that takes nothing has nothing read for it, whatever it asks; then it gets all."""
    data = os.urandom(8 * 1024 * 1024)
    (tmp_path / "file").write_bytes(data)
    talk = converse(granted=100)
    piece = 128 * 1024
    count = len(data) // piece
    talk.send(fw.OPEN, fw.OPEN_HEAD.pack(1, READ), NOTHING, b"file")
    for index in range(count):
        talk.send(fw.READ, fw.READ_BODY.pack(1, index * piece, piece))
    talk.wait(lambda: talk.service._exchange.hungry)
    made = sum(map(len, talk.service._exchange.answers)) + talk.service._stream.queued
    assert made <= piece + 100
    assert len(talk.heard) <= 100
    talk.stream.grant(2**40)
    assert talk.answer()[1] == ""
    assert b"".join(talk.answer()[2] for _ in range(count)) == data


def test_answers_wait_for_the_carrier_in_bounded_number(converse, tmp_path):
    """With all credit, and a carrier that takes nothing, no more than ``AHEAD`` is read."""
    size = 4 * 1024 * 1024
    (tmp_path / "file").write_bytes(bytes(size))
    talk = converse()
    assert talk.open(b"file", READ) == ""
    piece = 64 * 1024
    for index in range(size // piece):
        talk.send(fw.READ, fw.READ_BODY.pack(1, index * piece, piece))
    while (message := talk.gateway.next_message()) is not None:
        talk.agent.receive(b"".join(message), 0.0)
    while not talk.service._exchange.hungry:
        talk.posted.get(timeout=PATIENCE_SECONDS)()
    while not talk.posted.empty():
        talk.posted.get()()
    assert talk.service._stream.queued <= module.AHEAD + piece + fw.HEAD.size
    assert sum(len(talk.answer()[2]) for _ in range(size // piece)) == size


def test_eof_answers_what_came_and_closes(converse, tmp_path):
    """The orderly end: everything asked is done, then CLOSE."""
    talk = converse()
    talk.send(fw.OPEN, fw.OPEN_HEAD.pack(1, WRITE | CREATE), NOTHING, b"file")
    for index in range(200):
        talk.send(fw.WRITE, fw.WRITE_HEAD.pack(1, index), b"%d" % (index % 10))
    talk.stream.append(frames.EOF)
    assert [talk.answer()[1] for _ in range(201)] == [""] * 201
    talk.wait(lambda: talk.closed)
    assert talk.reason == ""
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 20


def test_services_are_limited(converse, tmp_path, monkeypatch):
    """One too many is refused with a sentence."""
    monkeypatch.setattr(module, "MAX_SERVICES", FileService.running + 1)
    converse()
    assert "too many" in converse().refused


@pytest.mark.parametrize(
    "parameters",
    [{"root": 5}, {"root": "relative"}, {"root": "/a\0b"}, {"directory": ["x"]},
     {"root": "/€"}, {"root": "/nonexistent/place"}, {"root": "/etc/passwd"}],
)  # fmt: skip
def test_impossible_requests_are_refused(converse, parameters):
    """What is no directory to be in is refused, not served as the whole host."""
    assert converse(**parameters).refused


def test_a_fifo_holds_nobody_up(converse, tmp_path):
    """A FIFO without another end is opened or refused at once; other requests go on."""
    os.mkfifo(tmp_path / "fifo")
    talk = converse()
    assert talk.open(b"fifo", WRITE, 2) == "FAILURE"
    assert talk.open(b"fifo", READ, 1) == ""
    assert talk.read(1)[0] == "FAILURE"
    assert talk.ask(fw.STAT, os.fsencode(tmp_path))[0] == ""


def test_a_copy_stops_with_its_stream(converse, tmp_path, monkeypatch):
    """Slices are small enough that a closed stream does not copy on."""
    from conchkernel.remote import fileops

    with (tmp_path / "source").open("wb") as file:
        file.truncate(64)
    gate, copied = threading.Semaphore(0), []

    def slow(source, target, count, offset, target_offset):
        gate.acquire(timeout=PATIENCE_SECONDS)
        copied.append(offset)
        return 1

    monkeypatch.setattr(fileops, "copy_slice", slow)
    talk = converse()
    assert talk.open(b"source", READ, 1) == ""
    assert talk.open(b"target", WRITE | CREATE, 2) == ""
    talk.send(fw.COPY, fw.COPY_BODY.pack(1, 0, 0, 2, 0))
    talk.pump()
    gate.release()
    talk.stream.close()
    talk.pump()
    gate.release()
    talk.end()
    assert len(copied) <= 2


def test_a_call_that_hangs_keeps_its_own_stream_only(converse, tmp_path, monkeypatch):
    """A disk that does not answer: another stream is served, and this one can be closed."""
    gate, called = threading.Event(), threading.Event()

    def hang(fd):
        called.set()
        gate.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(os, "fsync", hang)
    stuck, other = converse(), converse()
    assert stuck.open(b"file", WRITE | CREATE) == ""
    stuck.send(fw.WRITE, fw.WRITE_HEAD.pack(1, 0), b"written")
    stuck.send(fw.FSYNC, fw.HANDLE.pack(1))
    # What was done before is answered, though the call behind it hangs.
    assert stuck.answer()[1] == ""
    assert called.wait(PATIENCE_SECONDS)
    assert other.content(b"file") == b"written"
    stuck.stream.close()
    stuck.pump()
    assert other.content(b"file") == b"written"
    gate.set()


# --- the jail --------------------------------------------------------------------------------


@pytest.fixture
def jail(tmp_path, converse):
    """A jail with ways out painted on its walls, a secret outside, and a client inside."""
    outside = tmp_path / "outside"
    (outside / "directory").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (outside / "directory" / "secret").write_bytes(b"secret")
    root = tmp_path / "jail"
    (root / "inner" / "deep").mkdir(parents=True)
    (root / "inner" / "file").write_bytes(b"inside")
    (root / "absolute").symlink_to(outside)
    (root / "relative").symlink_to("../outside")
    (root / "file").symlink_to("../outside/secret")
    (root / "dots").symlink_to("inner/../../outside")
    (root / "inner" / "up").symlink_to("..")
    (root / "inner" / "deep" / "upup").symlink_to("../../..")
    (root / "root").symlink_to("/")
    (root / "proc").symlink_to("/proc/self/root")
    (root / "fd").symlink_to("/proc/self/fd")
    (root / "dangling").symlink_to("../outside/created")
    (root / "chain").symlink_to("chain2")
    (root / "chain2").symlink_to("absolute")
    (root / "loop").symlink_to("loop")
    (root / "pool").symlink_to("loop2")
    (root / "loop2").symlink_to("pool")
    talk = converse(root=os.fsencode(root), directory=os.fsencode(root / "inner"))
    return talk, root, outside


WAYS_OUT = [
    b"../secret", b"../outside/secret", b"/../outside/secret", b"/inner/../../outside/secret",
    b"/./../outside/secret", b"//..//outside//secret", b"/inner/deep/../../../outside/secret",
    b"absolute/secret", b"/absolute/secret", b"/absolute/../outside/secret", b"/relative/secret",
    b"/file", b"/dots/secret", b"/inner/up/../outside/secret", b"/inner/up/up/../outside/secret",
    b"/inner/deep/upup/outside/secret", b"/inner/deep/upup/../outside/secret",
    b"/root/outside/secret", b"/root/../outside/secret", b"/proc/etc/passwd", b"/proc/self/cwd",
    b"/fd/0", b"/chain/secret", b"/chain2/secret", b"/loop", b"/pool/x", b"/dangling",
    b"/absolute", b"/relative", b"/dots", b"/inner/deep/upup/outside", b"/etc/passwd",
    b"/" + b"../" * 500 + b"etc/passwd", b"/" + b"inner/up/" * 60 + b"../outside/secret",
]  # fmt: skip


def everything(outside: Path) -> list[object]:
    """All there is to know of what is outside."""
    found = []
    for path in (outside, *sorted(outside.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found.append((path, status.st_mode, status.st_uid, status.st_mtime_ns, content))
    return found


@pytest.mark.parametrize("way", WAYS_OUT)
def test_nobody_leaves_the_jail(jail, way):
    """No operation reads, changes or finds anything outside, whichever way it takes."""
    talk, _, outside = jail
    before = everything(outside)
    assert talk.content(way) in fw.PROBLEMS
    full = fw.ATTRIBUTES.pack(fw.HAS_SIZE | fw.HAS_MODE | fw.HAS_TIMES, 0, fw.SAME, fw.SAME,
                              0o777, 0, 0, 0)  # fmt: skip
    one = fw.U16.pack(len(way)) + way
    mine = fw.U16.pack(len(b"/inner/file")) + b"/inner/file"
    for operation, body in (
        (fw.SETSTAT, full + way), (fw.STAT, way), (fw.REALPATH, way), (fw.STATVFS, way),
        (fw.OPENDIR, fw.HANDLE.pack(50) + way), (fw.READDIR, fw.HANDLE.pack(50)),
        (fw.OPEN, fw.OPEN_HEAD.pack(51, READ | WRITE | CREATE) + NOTHING + way),
        (fw.WRITE, fw.WRITE_HEAD.pack(51, 0) + b"changed"),
        (fw.OPEN, fw.OPEN_HEAD.pack(52, WRITE | CREATE | fw.OPEN_EXCLUSIVE) + NOTHING + way),
        (fw.OPEN, fw.OPEN_HEAD.pack(53, WRITE | fw.OPEN_TRUNCATE) + NOTHING + way),
        (fw.MKDIR, NOTHING + way + b"/new"), (fw.SYMLINK, fw.U16.pack(1) + b"x" + way + b"/l"),
        (fw.LINK, one + b"/inner/stolen"), (fw.LINK, mine + way), (fw.LINK, mine + way + b"/h"),
        (fw.RENAME, b"\1" + one + b"/inner/renamed"), (fw.RENAME, b"\1" + mine + way + b"/r"),
        (fw.REMOVE, way + b"/secret"), (fw.RMDIR, way + b"/directory"), (fw.REMOVE, way),
        (fw.RMDIR, way), (fw.LSETSTAT, full + way),
    ):  # fmt: skip
        _, answer = talk.ask(operation, body)
        assert b"secret" not in answer or way.endswith(b"secret")
        assert not answer.startswith(os.fsencode(outside))
    assert everything(outside) == before


def test_links_inside_work(jail):
    """What stays in is followed, `..` of the root is the root, absolute links begin there."""
    talk, root, _ = jail
    (root / "good").symlink_to("inner/file")
    (root / "inner" / "deep" / "abs").symlink_to("/inner")
    (root / "inner" / "back").symlink_to("../good")
    for path in (
        b"/inner/file", b"file", b"/good", b"/inner/up/good", b"/inner/up/inner/file",
        b"/inner/deep/abs/file", b"/inner/back", b"/../../inner/file", b"/inner/deep/../file",
        b"/inner/deep/upup/inner/file", b"/root/inner/file",
    ):  # fmt: skip
        assert talk.content(path) == b"inside", path
    assert talk.info["home"] == "/inner"
    for path, real in (
        (b"", b"/inner"), (b".", b"/inner"), (b"/", b"/"), (b"/..", b"/"), (b"/inner/up", b"/"),
        (b"/inner/back", b"/inner/file"), (b"new", b"/inner/new"), (b"/inner/deep/abs/", b"/inner"),
        (b"/inner/deep/upup", b"/"),
    ):  # fmt: skip
        assert talk.ask(fw.REALPATH, path) == ("", real)
    assert talk.ask(fw.REALPATH, b"/none/new")[0] == "NOT_FOUND"
    assert talk.ask(fw.READLINK, b"/relative") == ("", b"../outside")
    mode = fw.ATTRIBUTES.pack(fw.HAS_MODE, 0, 0, 0, 0o604, 0, 0, 0)
    assert talk.ask(fw.SETSTAT, mode, b"/inner/back")[0] == ""
    assert stat.S_IMODE((root / "inner" / "file").stat().st_mode) == 0o604
    assert talk.ask(fw.LSETSTAT, mode, b"/good")[0] == "UNSUPPORTED"


def test_the_root_itself_stays(jail):
    """It cannot be removed, renamed or made; its `..` is itself."""
    talk, _, _ = jail
    two = fw.U16.pack(1) + b"/" + b"/inner/x"
    assert talk.ask(fw.RMDIR, b"/")[0] == "FAILURE"
    assert talk.ask(fw.REMOVE, b"/..")[0] == "FAILURE"
    assert talk.ask(fw.RENAME, b"\1" + two)[0] == "FAILURE"
    assert talk.ask(fw.MKDIR, NOTHING, b"/")[0] == "EXISTS"
    assert talk.ask(fw.OPENDIR, fw.HANDLE.pack(1), b"/")[0] == ""
    _, piece = talk.ask(fw.READDIR, fw.HANDLE.pack(1))
    own = fw.U16.pack(1) + b"."
    above = fw.U16.pack(2) + b".."
    start, parent = piece.index(own) + len(own), piece.index(above) + len(above)
    size = fw.ATTRIBUTES.size
    assert piece[start : start + size] == piece[parent : parent + size]


def test_homes_outside_are_not_told(jail):
    """A home directory that lies outside has no name in the jail."""
    talk, _, _ = jail
    assert talk.ask(fw.HOME, b"root")[0] == "NOT_FOUND"
    assert talk.ask(fw.HOME) == ("", b"/inner")


def test_races_lead_nowhere(jail):
    """A directory is exchanged with a link to the outside, all the time; nobody gets out."""
    talk, root, outside = jail
    before = everything(outside)
    (root / "racer").mkdir()
    (root / "racer" / "secret").write_bytes(b"decoy")
    link = root / "link"
    link.symlink_to("../outside")
    ended = threading.Event()

    def race():
        while not ended.is_set():
            for first, second in (("racer", "spare"), ("link", "racer"), ("racer", "link"),
                                  ("spare", "racer")):  # fmt: skip
                os.rename(root / first, root / second)

    racer = threading.Thread(target=race)
    racer.start()
    try:
        change = fw.ATTRIBUTES.pack(fw.HAS_MODE | fw.HAS_TIMES, 0, 0, 0, 0o777, 0, 0, 0)
        heard = set()
        for _ in range(400):
            heard.add(talk.content(b"/racer/secret"))
            talk.ask(fw.SETSTAT, change, b"/racer/secret")
            talk.ask(fw.SETSTAT, change, b"/racer")
            talk.ask(fw.MKDIR, NOTHING, b"/racer/made")
            talk.ask(fw.RMDIR, b"/racer/made")
    finally:
        ended.set()
        racer.join()
    assert b"secret" not in heard
    assert b"decoy" in heard
    assert everything(outside) == before


def test_read_only_changes_nothing(converse, tmp_path):
    """Whatever would change something is refused; reading works."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "directory").mkdir()
    before = everything(tmp_path)
    talk = converse(read_only=True)
    two = fw.U16.pack(4) + b"file" + b"other"
    for operation, body in (
        (fw.SETSTAT, NOTHING + b"file"), (fw.LSETSTAT, NOTHING + b"file"), (fw.REMOVE, b"file"),
        (fw.MKDIR, NOTHING + b"new"), (fw.RMDIR, b"directory"), (fw.RENAME, b"\1" + two),
        (fw.SYMLINK, two), (fw.LINK, two), (fw.FSETSTAT, fw.HANDLE.pack(1) + NOTHING),
        (fw.WRITE, fw.WRITE_HEAD.pack(1, 0) + b"x"), (fw.COPY, bytes(fw.COPY_BODY.size)),
    ):  # fmt: skip
        assert talk.ask(operation, body)[0] == "READ_ONLY", operation
    for flags in (WRITE, READ | WRITE, READ | CREATE, READ | fw.OPEN_TRUNCATE, fw.OPEN_APPEND,
                  READ | fw.OPEN_EXCLUSIVE):  # fmt: skip
        assert talk.open(b"file", flags, 2) == "READ_ONLY"
    assert talk.content(b"file") == b"content"
    assert everything(tmp_path) == before


def test_a_walk_leaves_no_descriptor(tmp_path):
    """Whether it succeeds or not."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "link").symlink_to("../a/b/..")
    before = set(os.listdir("/proc/self/fd"))
    jail = Jail(os.fsencode(tmp_path))
    for path in (b"/a/b", b"/a/link", b"/a/link/b/..", b"/"):
        with jail.at(path, True):
            pass
    for path, number in ((b"/x/y", errno.ENOENT), (b"/a/b/c/d", errno.ENOENT),
                         (b"a" * 5000, errno.ENAMETOOLONG)):  # fmt: skip
        with pytest.raises(OSError, match=r"\[Errno ") as caught:
            jail.at(path, True)
        assert caught.value.errno == number
    jail.close()
    assert set(os.listdir("/proc/self/fd")) <= before
