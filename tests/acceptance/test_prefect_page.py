"""A run's page in Prefect, as people see it: read by a real browser and held against the ledger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.browser import CHROMIUM, NO_CHROMIUM, browsing
from tests.acceptance.played import Played

pytestmark = [pytest.mark.xdist_group("prefect"), pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
#: A folder for the pictures that the README shows; without it they go with the test.
PICTURES = "PREFECT_PICTURES"


async def test_a_run_s_page_shows_its_progress_its_costs_and_its_report_as_the_ledger_has_them(
    played: Played, tmp_path: Path
) -> None:
    server = played.server
    audit = json.loads(server.command("farthing", "audit", "1", "--json", **played.sandbox))
    audit["document_costs"]["dearest"] = audit["slowest"] = []  # what all of Prefect may see names no document
    (flow_run, *_) = server.post(
        "flow_runs/filter", deployments={"name": {"any_": ["enrich"]}}, sort="EXPECTED_START_TIME_ASC"
    )
    shown = server.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run["id"]]}})
    left = (Path(server.environment["FARTHING_REPORTS"]) / "run-1.html").read_text("utf-8")
    figures = json.loads(left.partition('id="figures">')[2].partition("</script>")[0])
    assert figures == {name: value for name, value in audit.items() if name != "run_list"}
    ids = {artifact["key"]: artifact["id"] for artifact in shown}
    pages = server.url.removesuffix("/api") + "/v2"
    pictures = Path(os.environ.get(PICTURES, tmp_path))
    async with browsing(tmp_path / "browser") as page:
        await page.open(f"{pages}/runs/flow-run/{flow_run['id']}")
        await page.shows("enrich-obligations", "Completed")
        await page.click("Artifacts", *ids)
        await page.keep(pictures / "prefect-run.png")
        for key, figures in told_by(audit).items():
            await page.open(f"{pages}/artifacts/artifact/{ids[key]}")
            await page.shows(*figures)
            await page.keep(pictures / f"prefect-{key}.png")
            linked = await page.evaluate("[...document.querySelectorAll('a')].map(a => a.href)")
            assert ("https://reports.example/farthing/run-1.html" in linked) == key.endswith("-report")
        assert page.uncaught == []


def told_by(audit: dict[str, Any]) -> dict[str, list[str]]:
    """What each artifact must say of a run, by the figures of its audit."""
    tiers = [f"{name} {each['attempts']:,} {each['results']:,} " for name, each in audit["tiers"].items()]
    totals = [f"{figure} {audit[figure]:,}" for figure in ("documents", "results", "attempts", "escalated")]
    documents = f"{audit['documents']:,}"
    return {
        "run-1": [f"{documents} of {documents} documents", "spent · done"],
        "run-1-cost": tiers,
        "run-1-escalations": ["low confidence → ", "right before → after"],
        "run-1-report": [
            f"({audit['cost_pico']:,} pico)",
            *totals,
            *tiers,
            "What escalation bought",
            "SIMULATED",
            "The report page",
        ],
    }
