"""The line that ``ls -l`` would print, as OpenSSH's sftp-server writes it for each name.

Clients that show files by it (OpenSSH's ``ls -l``, old FileZilla) expect names of accounts where
there are some, and a date of ls(1): the time of day for the last half year, else the year.
"""

from __future__ import annotations

import stat
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conchkernel.files import Attributes

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
#: Beyond this age, or in the future, ls(1) prints the year: half of a mean Gregorian year.
_RECENT_SECONDS = 365.2425 * 86400 / 2


def longname(name: bytes, attributes: Attributes, now: float) -> bytes:
    """The line, in UTF-8 but for the name, which is as it is.

    :param now: seconds since the epoch.
    """
    mode = "??????????" if attributes.mode is None else stat.filemode(attributes.mode)
    links = 1 if attributes.links is None else attributes.links
    owner = attributes.owner or _number(attributes.uid)
    group = attributes.group or _number(attributes.gid)
    size = 0 if attributes.size is None else attributes.size
    line = f"{mode} {links:>3} {owner:<8} {group:<8} {size:>8} {_date(attributes.mtime, now)} "
    return line.encode("utf-8", "replace") + name


def _number(account: int | None) -> str:
    return "?" if account is None else str(account)


def _date(mtime: float | None, now: float) -> str:
    if mtime is None:
        return " " * 12
    try:
        then = time.localtime(mtime)
    except (OverflowError, ValueError, OSError):
        return " " * 12
    month = _MONTHS[then.tm_mon - 1]
    if 0 <= now - mtime < _RECENT_SECONDS:
        return f"{month} {then.tm_mday:>2} {then.tm_hour:02}:{then.tm_min:02}"
    return f"{month} {then.tm_mday:>2}  {then.tm_year}"
