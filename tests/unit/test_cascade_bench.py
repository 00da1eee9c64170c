"""The bench of the cascade measures what it says: our rule keeps its promise there, a threshold by hand does not."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cascade import made_pair, measure_cell, other_modes, supg_pairs


def test_a_cell_tells_the_rule_that_holds_from_the_one_that_does_not() -> None:
    cell = measure_cell(made_pair(1_531, ("0.95",)), "0.95", trials=300)
    chosen = cell["choosers"]
    assert chosen["certified"]["broken"] <= 30  # of 300 at 0.05: more, once in ten thousand times
    assert chosen["by hand"]["broken"] >= 60
    assert (
        cell["ideal"] < chosen["certified"]["share"] < chosen["normal"]["share"] < chosen["hoeffding"]["share"] == 1
    )
    assert cell["certificate"]["cut"] > 0


def test_the_other_modes_keep_their_promises_too() -> None:
    for mode in other_modes(made_pair(1_531, ("0.95",)), trials=100):
        assert mode["broken"] <= 15, mode["mode"]


def test_a_proxy_s_score_is_as_sure_as_it_is_far_from_a_half(tmp_path: Path) -> None:
    (tmp_path / "onto.csv").write_text("id,label,proxy_score\n0,0.0,0.25\n1,1.0,0.25\n2,1.0,0.875\n")
    (tmp_path / "tacred.csv").write_text("id,label,proxy_score\n0,True,0.25\n1,False,0.25\n")
    tacred, onto = supg_pairs(tmp_path)
    assert (tacred.agrees, onto.agrees) == ((False, True), (True, False, True))
    assert (tacred.confidence, onto.confidence) == ((0.75, 0.75), (0.75, 0.75, 0.875))
