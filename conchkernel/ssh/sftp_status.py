"""From what a store says to what SFTP version 3 can say, in one table.

The codes are those that OpenSSH's sftp-server gives for the same errno, since clients were made
against it. Version 3 has few of them, so the sentence carries what the code cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError

from conchkernel.errors import ConchKernelError, LinkLost
from conchkernel.files import FileProblem, FileStoreError
from conchkernel.ssh.sftp_packets import Status, status

if TYPE_CHECKING:
    from conchkernel.ssh.sftp_packets import Reply

#: sftp-server.c, errno_to_portable().
CODES: dict[FileProblem, Status] = {
    FileProblem.NOT_FOUND: Status.NO_SUCH_FILE,
    FileProblem.PERMISSION: Status.PERMISSION_DENIED,
    FileProblem.EXISTS: Status.FAILURE,
    FileProblem.NOT_DIRECTORY: Status.NO_SUCH_FILE,
    FileProblem.IS_DIRECTORY: Status.FAILURE,
    FileProblem.NOT_EMPTY: Status.FAILURE,
    FileProblem.NO_SPACE: Status.FAILURE,
    FileProblem.QUOTA: Status.FAILURE,
    FileProblem.READ_ONLY: Status.PERMISSION_DENIED,
    FileProblem.NAME_TOO_LONG: Status.BAD_MESSAGE,
    FileProblem.LOOP: Status.NO_SUCH_FILE,
    FileProblem.INVALID: Status.BAD_MESSAGE,
    FileProblem.UNSUPPORTED: Status.OP_UNSUPPORTED,
    FileProblem.CONNECTION_LOST: Status.CONNECTION_LOST,
    FileProblem.FAILURE: Status.FAILURE,
}

#: A store's sentence may name a path; nobody reads more than this.
_MAX_MESSAGE_CHARACTERS = 1024


def statusOf(error: BaseException | None) -> Reply | None:
    """The answer that tells of an error, or nothing if it is none that a store may have."""
    if isinstance(error, FileStoreError):
        return status(CODES[error.problem], str(error)[:_MAX_MESSAGE_CHARACTERS])
    if isinstance(error, LinkLost):
        return status(Status.CONNECTION_LOST, str(error)[:_MAX_MESSAGE_CHARACTERS])
    if isinstance(error, ConchKernelError):
        return status(Status.FAILURE, str(error)[:_MAX_MESSAGE_CHARACTERS])
    if isinstance(error, CancelledError):
        return status(Status.FAILURE, "given up")
    return None
