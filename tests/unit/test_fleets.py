"""What follows from how Prefect and the ledger have a fleet's lanes: who is lost, who is late, who is waited for."""

from __future__ import annotations

import pytest

from schemas.fleets import SILENT_S, Absence, FleetSeen, Kept, LaneSeen, Shown


@pytest.mark.parametrize(
    ("shown", "kept", "silent_s", "is_lost"),
    [
        (Shown.WORKING, Kept.ALIVE, 0.0, False),
        (Shown.WORKING, Kept.DIED, 0.0, True),  # its machine is gone: others buried it
        (Shown.WORKING, Kept.ABSENT, SILENT_S, False),  # it reads the job, it lists the files
        (Shown.WORKING, Kept.ABSENT, SILENT_S + 1, True),  # gone before it came to the ledger
        (Shown.WORKING, Kept.LEFT, 1.0, False),  # it says goodbye to Prefect
        (Shown.WORKING, Kept.LEFT, SILENT_S + 1, True),
        (Shown.OVER, Kept.DIED, 0.0, False),  # Prefect knows
        (Shown.WAITING, Kept.ABSENT, SILENT_S + 1, False),  # no worker has begun it
    ],
)
def test_a_lane_is_lost_where_prefect_shows_it_at_work_and_the_ledger_does_not(
    shown: Shown, kept: Kept, silent_s: float, is_lost: bool
) -> None:
    assert LaneSeen(1, shown, kept, silent_s).is_lost is is_lost


@pytest.mark.parametrize("is_run_over", [True, False])
def test_who_has_not_begun_is_late_once_the_run_needs_nobody_and_waited_for_until_then(is_run_over: bool) -> None:
    lanes = [LaneSeen(1, Shown.OVER, Kept.LEFT), LaneSeen(2, Shown.WAITING, Kept.ABSENT)]
    seen = FleetSeen(lanes, is_run_over)
    assert not seen.is_at_work
    assert (seen.late, seen.is_waited_for) == (([2], False) if is_run_over else ([], True))


def test_time_in_which_nobody_was_waited_for_is_no_absence() -> None:
    absence = Absence(within_s=10)
    assert not absence.is_over(0, is_at_work=False)
    assert absence.is_over(11, is_at_work=False)
    absence.begin()
    assert not absence.is_over(30, is_at_work=False)
    assert absence.is_over(41, is_at_work=False)
