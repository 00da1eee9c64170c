"""Put before a command as its `sitecustomize`: whatever any library logs, at any level, is written down.

FARTHING_FAULTS_HEARD names the file. FARTHING_FAULTS_BUG plants a bug of the worst kind: where an answer has that
text in it, an exception in the middle of a document's way whose message quotes the answer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

_formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
_call_handlers = logging.Logger.callHandlers


def _overhear(self: logging.Logger, record: logging.LogRecord) -> None:
    line = f"{_formatter.format(record)} {record.msg!r} {record.args!r}\n"
    os.write(_heard, line.encode(errors="backslashreplace"))
    _call_handlers(self, record)


def _quote(self: object, instance: object, *more: object) -> Iterator[object]:
    if os.environ["FARTHING_FAULTS_BUG"] in repr(instance):
        raise RuntimeError(f"a bug met {instance!r}")
    yield from _iter_errors(self, instance, *more)  # type: ignore[arg-type]


if "FARTHING_FAULTS_HEARD" in os.environ:
    _heard = os.open(os.environ["FARTHING_FAULTS_HEARD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    logging.Logger.callHandlers = _overhear  # type: ignore[method-assign]  # every record of everyone
    logging.Logger.isEnabledFor = lambda self, level: True  # type: ignore[method-assign]  # at every level
if "FARTHING_FAULTS_BUG" in os.environ:
    import jsonschema

    _iter_errors = jsonschema.Draft202012Validator.iter_errors
    jsonschema.Draft202012Validator.iter_errors = _quote  # a bug in a library
