"""What a flow's process does with log lines that nobody reads any more."""

from __future__ import annotations

import logging
import os
import sys

import pytest
from prefect.logging.handlers import PrefectConsoleHandler

from tasks.logs import LOGGER, follow_in_prefect


def test_a_flow_goes_on_after_the_worker_is_gone_that_read_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        logger = logging.getLogger("prefect.of_a_test")
        monkeypatch.setattr(logger, "handlers", [PrefectConsoleHandler(stream)])
        monkeypatch.setattr(logging.getLogger(LOGGER), "handlers", [])
        monkeypatch.setattr(sys, "stdout", stream)  # which rich puts out of use, or pytest's
        follow_in_prefect()
        os.close(reader)
        logger.warning("shard done")
