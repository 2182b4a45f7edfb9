"""Kills at random moments: the resumed run must end where the undisturbed one ends, bit for bit."""

import json
import re

import kill_runs
import pytest

KILLS = 50


@pytest.mark.slow
def test_fifty_kills_leave_no_trace(tmp_path):
    table = kill_runs.run_kills(KILLS, 0, tmp_path)
    assert len(table["kills"]) == KILLS
    assert set(map(tuple, table["runs"].values())) == {()}, table["runs"]
    check_moments(table["kills"])


def check_moments(rows):
    """Each is answered as it should be, and with either signal they include all that is needed."""
    for row in rows:
        check_row(row)
    for signal in ("SIGKILL", "SIGTERM"):
        doing = {row["doing"] for row in rows if row["signal"] == signal}
        assert doing >= kill_runs.NEEDED, f"{signal} met {doing} only"


def check_row(row):
    """A kill says nothing; SIGTERM says how to go on, but in the interpreter's first moments and at the very end."""
    if row["signal"] == "SIGKILL":
        assert row["exit_status"] == -9 and not row["said"], row
    elif row["doing"] == "interpreter" and row["exit_status"] != 0:
        assert row["exit_status"] == -15 and not row["said"], row
    else:
        assert row["exit_status"] == 0, row
        if row["ended"]:
            assert not row["said"], row
        else:
            (line,) = row["said"]
            # "Go on with", of version 0.1.0, in the committed table
            assert re.match("stopped by SIGTERM; .*(Resume|Go on) with: pspinal-jax train digits", line)


def test_the_committed_table_is_one_of_fifty_and_of_no_difference():
    folder = kill_runs.REPOSITORY / "results" / "kills"
    table = json.loads((folder / "results.json").read_text())
    assert len(table["kills"]) == KILLS and not any(table["runs"].values())
    check_moments(table["kills"])
    assert (folder / "README.md").read_text() == kill_runs.page(table)
