"""Where structlog events go: Prefect's log of the flow run, and JSON lines for machines where asked for.

No event holds a key, a DSN or document text (G15): the code that logs passes only numbers, names and reasons.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from typing import IO

import structlog

from schemas.inert import plain_lines

LOGGER = "farthing"


def configure(*, json_lines: bool = False) -> None:
    """Send structlog through the stdlib logger `farthing`; with `json_lines` also as JSON to stderr. Repeatable."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, JsonHandler)]
    if json_lines:
        logger.addHandler(JsonHandler())


def follow_in_prefect() -> None:
    """Show the events in the log of the current flow run, as short lines. Call it inside a flow."""
    from prefect.logging.handlers import APILogHandler

    _outlive_worker()
    logger = logging.getLogger(LOGGER)
    if any(isinstance(handler, APILogHandler) for handler in logger.handlers):
        return
    handler = APILogHandler()
    handler.setFormatter(
        _formatter(_leave_to_prefect, _make_plain, structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0))
    )
    logger.addHandler(handler)


def _outlive_worker() -> None:
    """Go on when the worker is killed that started this process: it reads what Prefect logs here, and rich, which
    writes that, ends a process whose reader is gone.
    """
    from prefect.logging.handlers import PrefectConsoleHandler

    loggers = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, PrefectConsoleHandler):
            silence = partial(_silence, handler.console.file)
            handler.console.on_broken_pipe = silence  # type: ignore[method-assign]  # the console is Prefect's own


def _silence(stream: IO[str]) -> None:
    """Let nobody read what is written there from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class JsonHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic only in typeshed
    """One JSON object per event on stderr."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_formatter(structlog.processors.JSONRenderer()))


def _leave_to_prefect(logger: object, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Its page has the instant and the level of each line beside it."""
    return {key: value for key, value in event.items() if key not in ("timestamp", "level")}


def _make_plain(logger: object, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What others wrote, such as a model's name, spelt out where it could act on a terminal. JSON escapes it."""
    return {key: plain_lines(value) if isinstance(value, str) else value for key, value in event.items()}


def _formatter(*processors: structlog.typing.Processor) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *processors]
    )
