"""The one error of the sandbox: it says what this machine lacks and what to do about it."""

from __future__ import annotations


class SandboxError(RuntimeError):
    """The sandbox cannot do what was asked on this machine. The message says what to do next."""
