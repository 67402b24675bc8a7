"""What a link needs of a road to the agent, whatever it is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol


class Carrier(Protocol):
    """A road for messages. It calls its user's ``received`` and, once, ``lost``."""

    @property
    def writable(self) -> bool:
        """Whether it takes messages without queueing them for long."""

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send one message, given in parts."""

    def close(self) -> None:
        """Give it up. ``lost`` is not called any more."""


class CarrierUser(Protocol):
    """What a carrier tells."""

    def received(self, message: bytes | memoryview) -> None:
        """One message has come."""

    def lost(self, reason: Exception) -> None:
        """The carrier is gone."""

    def resumed(self) -> None:
        """It is writable again."""


Connect = Callable[[CarrierUser], Awaitable[Carrier]]
