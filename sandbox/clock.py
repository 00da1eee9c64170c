"""The provider's own clock: settable, and running on in real time from where it was set."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import format_datetime

from sandbox.errors import SandboxError


def parse_instant(text: str) -> datetime:
    """Read `2026-11-25T02:00:00Z`. An instant without an offset is refused: guessing one would move the tariff."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise SandboxError(f"{text!r} is not an instant; write it like 2026-11-25T02:00:00Z") from None
    if instant.tzinfo is None:
        raise SandboxError(f"{text!r} has no offset; end it with Z")
    return instant.astimezone(UTC)


class Clock:
    """The emulator's time: this machine's, shifted to wherever it was set."""

    def __init__(self, start: datetime | None = None) -> None:
        self._shift = 0.0
        self._dated = (-1, "")
        if start is not None:
            self.set(start)

    def set(self, instant: datetime) -> None:
        self._shift = instant.timestamp() - time.time()

    def second(self) -> int:
        """Now as whole Unix seconds, cut off: what a Date header can say."""
        return int(time.time() + self._shift)

    def http_date(self, second: int) -> str:
        """The Date header of a second; formatting costs more than the rest of a header, so the last is kept."""
        if self._dated[0] != second:
            self._dated = (second, format_datetime(datetime.fromtimestamp(second, UTC), usegmt=True))
        return self._dated[1]
