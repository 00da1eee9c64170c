"""Where reports are kept, a flow leaves the page of its run or job, and its artifact says where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from schemas.settings import Settings
from tasks.artifacts import leave_page
from tasks.ledger.connection import Ledger
from tests.ledgers import run_everything


@pytest.fixture
async def settings(ledger: Ledger, ledger_url: str, tmp_path: Path) -> Settings:
    await run_everything(ledger)
    return Settings(database_url=SecretStr(ledger_url), reports=tmp_path / "kept" / "reports")


def figures(file: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        file.read_text("utf-8").partition('id="figures">')[2].partition("</script>")[0]
    )
    return found


async def test_pages_are_left_and_named_or_linked_where_something_serves_them(
    settings: Settings, tmp_path: Path
) -> None:
    assert await leave_page(settings, run=1) == [
        f"The report page: {tmp_path}/kept/reports/run-1.html".replace("_", "\\_")
    ]
    served = settings.model_copy(update={"reports_url": "https://reports.example/a b/"})
    assert await leave_page(served, job="colours") == [
        "[The report page](https://reports.example/a%20b/job-colours.html)"
    ]
    left = {path.name: figures(path) for path in (tmp_path / "kept" / "reports").iterdir()}
    assert {name: (each["run"], each["job"], each["attempts"]) for name, each in left.items()} == {
        "run-1.html": (1, "colours", 8),
        "job-colours.html": (1, "colours", 8),  # its one run
    }
    for path in (tmp_path / "kept" / "reports").iterdir():  # for all who may see Prefect's pages
        assert figures(path)["document_costs"]["dearest"] == []  # type: ignore[index]  # it is an object
        assert figures(path)["slowest"] == []
        assert "slowest documents" not in path.read_text("utf-8")


async def test_no_page_is_no_reason_for_a_flow_to_fail(settings: Settings, tmp_path: Path) -> None:
    assert await leave_page(settings.model_copy(update={"reports": None}), run=1) == []
    (tmp_path / "kept").write_text("a file, where a folder should be")
    assert await leave_page(settings, run=1) == []
