"""`easy-jax theory`: what it writes, and that a claim that fails is said to fail."""

import json
import subprocess
import sys

import jax
import pytest

from easy_jax.config import ConfigError
from easy_jax.report import theory as theory_report
from easy_jax.theory import claims, figures

FIGURES = {
    "trajectories",
    "errors_by_step",
    "stalling",
    "phase_diagram",
    "learning_rate",
    "convergence",
}


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys, monkeypatch):
    phases = figures.phases
    monkeypatch.setattr(figures, "phases", lambda: phases(size=7, max_steps=50))
    results = theory_report.run(tmp_path, num_problems=10)
    assert results["all_hold"] and len(results["claims"]) == claims.NUM_CLAIMS
    assert json.loads((tmp_path / "theory.json").read_text()) == results
    for row in results["claims"]:
        assert row["holds"] == (row["value"] <= row["bound"])
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES
    page = (tmp_path / "theory.html").read_text()
    assert page.count("<figure>") == len(FIGURES) and "http" not in page
    output = capsys.readouterr().out
    assert "E[w x x^T] by sampling" in output  # brackets are text, not markup
    assert f"all {claims.NUM_CLAIMS} claims hold" in output
    assert jax.numpy.zeros(1).dtype == "float32"  # float64 is not left on


def test_a_claim_that_does_not_hold_is_named(tmp_path, capsys):
    rows = [
        claims.Claim("(6)", "a", "b", 0.1, 0.2),
        claims.Claim("(9)", "a", "b", 0.3, 0.2),
        claims.Claim("(14)", "a", "b", float("nan"), 0.2),
    ]
    assert [row.holds for row in rows] == [True, False, False]
    theory_report._print(rows, tmp_path)
    assert "2 claims FAIL: ['(9)', '(14)']" in capsys.readouterr().out


def test_claims_are_checked_in_float64():
    with pytest.raises(RuntimeError, match="float64"):
        next(claims.check_claims(jax.random.key(0), lambda loss, tau: loss, None))


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the workdir"):
        theory_report.run(tmp_path / "file")


@pytest.mark.slow
def test_the_command_line_has_it(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "easy_jax.main", "theory", f"--workdir={tmp_path / 'file'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "easy-jax: cannot write to the workdir" in result.stderr
