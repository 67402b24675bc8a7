"""Which store a session with files gets: decided once, for each of them, when it is known."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from conchkernel.avatars import KernelAvatar
from conchkernel.errors import KernelRefused, KernelUnsupported
from conchkernel.filepolicies import JailedFileStore, ReadOnlyFileStore
from conchkernel.files import IFileStore
from conchkernel.interfaces import IKernelLink
from conchkernel.memoryfiles import MemoryFileStore
from conchkernel.stores import Files, StoreChoice
from conchkernel.testing import MemoryBackend, MemoryLink

NOT_PYTHON = KernelUnsupported("the kernel is not Python")


class Backend(MemoryBackend):
    """Whose links have files, or none.

    :ivar files: the files of the kernel's host.
    """

    files: IFileStore | None = None

    def _newLink(self) -> IKernelLink:
        link = MemoryLink()
        link.files = self.files
        return link


class Choosing:
    """A user whose kernel answers when the test says so, and a choice."""

    def __init__(self, files: Files = Files.AUTO, **options: Any) -> None:
        self.backend = Backend()
        self.backend.slow = True
        self.avatar = KernelAvatar(self.backend, "owner")
        self.contents: list[MemoryFileStore] = []
        self._choose = StoreChoice(self._begin, files=files, **options)

    def _begin(self) -> MemoryFileStore:
        self.contents.append(MemoryFileStore())
        return self.contents[-1]

    def session(self) -> tuple[Deferred[Any], list[Any]]:
        """Ask for a store; the Deferred, and what came of it."""
        came: list[Any] = []
        asked = self._choose(self.avatar)
        asked.addBoth(came.append)
        return asked, came

    def answer(self, error: Exception | None = None) -> MemoryFileStore:
        """The kernel is there, or is not; the files of its host."""
        files = MemoryFileStore()
        self.backend.files = files if error is None else None
        self.backend.answer(error)
        return files


def test_the_agents_where_there_is_one() -> None:
    """Nothing is decided before it is known; the Contents API is never asked."""
    choosing = Choosing()
    _, came = choosing.session()
    _, another = choosing.session()
    assert came == another == []
    files = choosing.answer()
    assert came == another == [files]
    assert choosing.contents == []


def test_contents_where_there_is_none() -> None:
    """The kernel is not Python, or its agent serves no files."""
    choosing = Choosing()
    _, came = choosing.session()
    choosing.answer(NOT_PYTHON)
    assert came == choosing.contents
    _, another = choosing.session()
    choosing.backend.answer()
    assert another == choosing.contents[1:]
    assert len(choosing.contents) == 2


def test_a_kernel_that_does_not_start_is_no_reason_for_other_files() -> None:
    """Paths would mean something else: the client is told what is wrong."""
    choosing = Choosing()
    _, came = choosing.session()
    choosing.answer(KernelRefused("too many kernels"))
    assert came[0].check(KernelRefused)
    assert choosing.contents == []


def test_agent_only() -> None:
    """Rather none than others."""
    choosing = Choosing(Files.AGENT)
    _, came = choosing.session()
    choosing.answer(NOT_PYTHON)
    assert came[0].check(KernelUnsupported)
    assert choosing.contents == []


def test_contents_only() -> None:
    """No kernel is started for it."""
    choosing = Choosing(Files.CONTENTS)
    _, came = choosing.session()
    assert came == choosing.contents
    assert choosing.backend.users == []


def test_who_does_not_wait_any_more() -> None:
    """The session ends while the agent is starting: that is all."""
    choosing = Choosing()
    asked, came = choosing.session()
    asked.cancel()
    assert came[0].check(CancelledError)
    choosing.answer()
    assert choosing.contents == []


@pytest.mark.parametrize("readOnly", [False, True])
def test_policies_of_contents(readOnly: bool) -> None:
    """The agent holds them itself; around the Contents API they are ours."""
    choosing = Choosing(Files.CONTENTS, root=b"/jail", readOnly=readOnly)
    _, came = choosing.session()
    assert isinstance(came[0], ReadOnlyFileStore if readOnly else JailedFileStore)
