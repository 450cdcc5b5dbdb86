"""The attacks of `tests/faults/` in short: a right result, or an error of one line."""

import attacks
import checkpoints
import flips
import kills
import numerics
import pairs
import pytest
import unidentified_connections

pytestmark = pytest.mark.slow


def test_numbers_at_the_edges(tmp_path):
    judged = [(case.name, *numerics.judge(case)) for case in numerics.cases(tmp_path)]
    wrong = [each for each in judged if each[1] not in ("right", "reported")]
    assert not wrong
    assert len(judged) == 94


def test_damaged_checkpoints(tmp_path):
    tally = attacks.Tally("same", "reported")
    checkpoints.attack(len(checkpoints.KINDS), 1, tmp_path, tally, with_command_line=False)
    assert not tally.wrong
    assert tally.counts.total() == len(checkpoints.KINDS)
    assert tally.counts["same"]


def test_flipped_bytes(tmp_path):
    tally = attacks.Tally("same", "reported")
    flips.attack(30, 1, tmp_path, tally, by_command_line=1)
    assert not tally.wrong
    assert tally.counts.total() == 31
    assert tally.counts["reported"]


@pytest.mark.parametrize("name", ["deep", "many", "imposter"])
def test_unidentified_connections(name, tmp_path):
    act = getattr(unidentified_connections, name)
    outcome, detail = unidentified_connections.attack(act, 0, tmp_path)
    assert outcome == "let in", detail


def test_two_runs_in_a_workdir(tmp_path):
    tally = attacks.Tally("in good order")
    pairs.attack(2, 0, tmp_path, tally)
    assert not tally.wrong


def test_killed_while_the_loss_table_is_completed(tmp_path):
    tally = attacks.Tally("bit-identical")
    kills.attack(["completing the loss table"], 0, tmp_path, tally)
    assert not tally.wrong
