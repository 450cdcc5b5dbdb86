"""What is shown while something runs: bars in a terminal, lines in a log; on a clock of its own."""

import io

import jax
import numpy as np
import pytest
from flax import nnx

from configs import quickstart
from easy_jax import pipeline as train
from easy_jax.cli import main
from easy_jax.config import StageConfig
from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.experiments.vision import ImageExperiment
from easy_jax.io import terminal
from easy_jax.io.progress import Count, Part
from easy_jax.io.terminal import Terminal, plain_console, shown
from easy_jax.train.fitting import fit
from easy_jax.train.scoring import score

LONG = "seed0/noise0.3/lr0.03/probe-all-flow-head-unweighted"


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def log_file(clock, **options):
    """A terminal that is none, and what it prints."""
    file = io.StringIO()
    return Terminal(plain_console(file=file, width=80), clock=clock, **options), file


def drawn(shows):
    """The lines that a terminal of 80 columns shows now."""
    console = plain_console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(shows._progress.get_renderable())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def live(clock):
    """A terminal of 80 columns; nothing is drawn but by `drawn`."""
    console = plain_console(file=io.StringIO(), width=80, force_terminal=True)
    return Terminal(console, clock=clock)


def steps(part, clock, count, seconds):
    for _ in range(count):
        clock.now += seconds
        part.advance(1)


def test_the_time_left_is_of_the_steps_after_the_first(clock):
    count = Count(clock)
    count.begin(total=100, done=40)
    assert count.left() is None
    clock.now += 60  # compilation
    count.advance(1)
    assert count.left() is None
    clock.now += 4
    count.advance(2)
    assert (count.done, count.left()) == (43, 57 * 2.0)
    clock.now += 1e6  # a long evaluation is no step yet
    assert count.left() == 57 * 2.0
    count.skip(7)
    assert (count.done, count.left()) == (50, 50 * 2.0)


def test_nothing_is_left_at_the_end(clock):
    count = Count(clock)
    count.begin(total=1, done=0)
    clock.now += 1000
    count.advance(3)
    assert (count.done, count.left()) == (1, 0.0)


def test_bars_fit_80_columns_with_counts_and_time_left(clock):
    shows = live(clock)
    shows.start({"probe": 30_000, LONG: 70_000})
    part = shows.part(LONG)
    part.begin(70_000, 20_000)
    steps(part, clock, 3, seconds=1.0)
    whole, stage = drawn(shows)
    assert max(len(whole), len(stage)) <= 80
    # Without colours the part of a bar that is not done is blank.
    assert whole.split() == ["all", "stages", "━━", "20,003/100,000", "steps", "22:13:17", "left"]
    assert stage.split()[2:] == ["20,003/70,000", "steps", "13:53:17", "left"]
    assert stage.startswith("…") and LONG.endswith(stage.split()[0][1:])


def test_a_finished_bar_has_nothing_left_though_much_time_has_passed(clock):
    shows = live(clock)
    shows.start({"fit": 5})
    part = shows.part("fit")
    part.begin(5, 0)
    steps(part, clock, 5, seconds=500.0)
    for line in drawn(shows):
        assert line.endswith("5/5 steps 0:00:00 left")


def test_a_bar_of_examples_fits_too(clock):
    shows = live(clock)
    part = shows.part(f"score {LONG}", "examples")
    part.begin(1_281_167, 1_000)
    steps(part, clock, 2, seconds=0.001)
    (line,) = drawn(shows)
    assert len(line) <= 80 and "1,002/1,281,167 examples 0:21:20 left" in line


def test_compilation_is_shown(clock):
    shows = live(clock)
    with shows:
        part = shows.part("fit")
        part.begin(10, 0)
        seen = []

        @jax.jit
        def step(x):  # the name of the training step
            seen.append(drawn(shows)[0])
            return x + 1

        step(np.float32(0))
        assert seen[0].startswith("compiling the training step")
        assert drawn(shows)[0].startswith("fit ")


def test_the_innermost_terminal_shows_compilation(clock):
    outer, inner = live(clock), live(clock)
    with outer, inner:
        pass
    with outer:
        with inner:
            terminal._open[-1].compiling("the forward pass")
        terminal._open[-1].compiling("the training step")
    assert drawn(inner)[0].startswith("compiling the forward pass")
    assert drawn(outer)[0].startswith("compiling the training step")
    assert terminal._open == []


def test_what_has_no_count_is_a_line_of_a_log(clock):
    shows, file = log_file(clock)
    shows.describe("evaluate flow")
    assert file.getvalue() == "evaluate flow\n"


def test_a_bar_is_not_redrawn_at_every_fast_step(clock):
    shows = live(clock)
    part = shows.part("fit")
    part.begin(1000, 0)
    redrawn = set()
    for _ in range(1000):
        steps(part, clock, 1, seconds=0.001)
        redrawn.add(shows._progress.tasks[-1].completed)
    assert 10 <= len(redrawn) <= 13 and 1000 in redrawn


def test_a_log_begins_at_once_and_has_a_line_a_stage_and_a_minute(clock):
    shows, file = log_file(clock)
    shows.start({"probe": 10, "finetune": 200})
    assert file.getvalue() == "2 stages, 210 training steps in all\n"
    part = shows.part("probe")
    part.begin(10, 0)
    shows.compiling("the training step")
    shows.compiling(None)
    steps(part, clock, 10, seconds=1.0)
    part = shows.part("finetune")
    part.begin(200, 50)
    shows.speed({"examples_per_second": 1234.5, "input_wait": 0.3})
    steps(part, clock, 100, seconds=1.0)
    assert file.getvalue().splitlines()[1:] == [
        "probe: 10 steps",
        "probe: compiling the training step ...",
        "finetune: continues after 50 of 200 steps",
        "finetune: 52 of 200 steps, 1,234 examples/s, 30% waiting for data; 62 of 210 steps in "
        "all, about 0:02:28 left",
        "finetune: 112 of 200 steps, 1,234 examples/s, 30% waiting for data; 122 of 210 steps in "
        "all, about 0:01:28 left",
    ]


def test_a_log_has_no_line_before_the_time_left_is_known(clock):
    shows, file = log_file(clock)
    shows.start({"fit": 100})
    part = shows.part("score", "examples")
    part.begin(10, 0)
    steps(part, clock, 10, seconds=1.0)
    part = shows.part("fit")
    part.begin(100, 0)
    shows.speed({"examples_per_second": 0.25, "input_wait": 0.0})
    steps(part, clock, 1, seconds=100.0)
    assert file.getvalue().splitlines() == [
        "1 stage, 100 training steps in all",
        "score: 10 examples",
        "fit: 100 steps",
    ]
    steps(part, clock, 1, seconds=3.0)
    assert file.getvalue().splitlines()[3:] == [
        "fit: 2 of 100 steps, 0.25 examples/s; 2 of 100 steps in all, about 0:04:54 left"
    ]


def test_where_a_stage_is_continued(clock, tmp_path):
    shows, file = log_file(clock)
    shows.start({"a": 8, "b": 8, "c": 8})
    for name, done in (("a", 8), ("b", 3)):
        shows.part(name, where=tmp_path / name).begin(8, done)
    shows.part("a", where=tmp_path / "a").begin(8, 8)  # looked up again: no news
    shows.skip("c")
    shows.skip("c")
    assert file.getvalue().splitlines()[1:] == [
        f"a: done, from checkpoint {tmp_path / 'a' / '8'}",
        f"b: continues after 3 of 8 steps, from checkpoint {tmp_path / 'b' / '3'}",
    ]
    assert (shows._whole.done, shows._whole.total) == (8 + 3 + 8, 24)


def test_a_stage_may_have_other_steps_than_planned(clock):
    shows, _ = log_file(clock)
    shows.start({"a": 100, "b": 100}, roughly=True)
    part = shows.part("a")
    part.begin(97, 0)
    steps(part, clock, 97, seconds=1.0)
    assert (shows._whole.done, shows._whole.total) == (97, 197)


def test_a_quiet_terminal_says_nothing(clock):
    shows, file = log_file(clock, quiet=True)
    with shows:
        shows.start({"fit": 5})
        part = shows.part("fit")
        part.begin(5, 2)
        steps(part, clock, 3, seconds=100.0)
    assert file.getvalue() == ""


def test_what_is_told_after_an_interruption(clock, tmp_path):
    shows, _ = log_file(clock)
    assert shows.interrupted() == "interrupted (starting); what was done before is kept"
    part = shows.part("fit", where=tmp_path / "fit")
    part.begin(50, 0)
    steps(part, clock, 23, seconds=1.0)
    none = "interrupted in fit after 23 of 50 steps, none saved yet; the stages before it are kept"
    assert shows.interrupted() == none
    (tmp_path / "fit" / "9").mkdir(parents=True)
    (tmp_path / "fit" / "20").mkdir()
    (tmp_path / "fit" / "23.orbax-checkpoint-tmp").mkdir()
    assert shows.interrupted() == (
        f"interrupted in fit after 23 of 50 steps; saved up to 20 in {tmp_path / 'fit'}"
    )
    shows.part("score", "examples").begin(100, 10)
    assert shows.interrupted() == (
        "interrupted in score after 10 of 100 examples; the parts that are written are kept"
    )


# `fit` and `score`.


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def _model_and_source():
    x = np.ones((40, 1), np.float32)
    return nnx.Linear(1, 1, rngs=nnx.Rngs(0)), ArraySource({"x": x, "y": x})


def _fit(directory, **options):
    return fit(
        *_model_and_source(),
        directory,
        stage=StageConfig(batch_size=8),
        loss_fn=_loss,
        save_every_steps=1,
        **options,
    )


def _score(directory, **options):
    return score(*_model_and_source(), directory, loss_fn=_loss, batch_size=8, **options)


class Heard(Part):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def begin(self, total, done, processes=1):
        self.told.append((total, done))

    def advance(self, count):
        self.told.append(count)


def _stop_after(count):
    """A function that ends `fit` when it is called once more."""
    counts = []

    def called(steps):
        counts.append(steps)
        if len(counts) > count:
            raise InterruptedError

    return called


def _begin_and_stop(directory):
    with pytest.raises(InterruptedError):
        _fit(directory, progress=_stop_after(2))


@pytest.mark.slow
def test_fit_and_score_tell_where_they_begin_and_every_step(tmp_path):
    _begin_and_stop(tmp_path / "fit")
    heard = Heard()
    _fit(tmp_path / "fit", progress=heard)
    assert heard.told == [(5, 2), 1, 1, 1]
    heard = Heard()
    _score(tmp_path / "table", progress=heard)
    assert heard.told == [(40, 0), 8, 8, 8, 8, 8]


@pytest.mark.slow
def test_by_default_a_log_has_only_news(tmp_path, capsys):
    _begin_and_stop(tmp_path / "fit")
    for _ in range(2):
        _fit(tmp_path / "fit")
        _score(tmp_path / "table")
    assert capsys.readouterr() == (
        "",
        "fit: continues after 2 of 5 steps\nfit: done before, all 5 steps\n",
    )


@pytest.mark.slow
def test_without_progress_nothing_is_said(tmp_path, capsys):
    _begin_and_stop(tmp_path / "fit")
    _fit(tmp_path / "fit", progress=False)
    _score(tmp_path / "table", progress=False)
    assert capsys.readouterr() == ("", "")


def test_processes_that_do_not_lead_are_quiet(capsys):
    with shown(True, "fit", "steps", quiet=True) as part:
        part.begin(5, 2)
    assert capsys.readouterr() == ("", "")


def test_what_processes_share_is_counted_for_all(clock):
    shows, _ = log_file(clock)
    part = shows.part("score", "examples")
    part.begin(100, 0, processes=4)
    part.advance(10)
    assert (part.count.done, part.count.total) == (40, 100)
    part.advance(20)
    assert part.count.done == 100


# The command line.


def test_ctrl_c_says_where_it_was_and_ends_with_130(tmp_path, capsys, monkeypatch):
    def interrupted(experiment, until):
        experiment.terminal.part("seed0/pretrain", where=tmp_path / "none").begin(16, 0)
        raise KeyboardInterrupt

    def run(command):
        train.run(quickstart.get_config("tiny"), tmp_path / "run")

    monkeypatch.setattr(ImageExperiment, "run", interrupted)
    monkeypatch.setattr(main, "main", run)
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    main._run("run")
    assert codes == [130]
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"quickstart-tiny: on 8 cpu devices, in {tmp_path / 'run'}",
        "seed0/pretrain: 16 steps",
    ]
    assert err == (
        "easy-jax: interrupted in seed0/pretrain after 0 of 16 steps, none saved yet; the stages "
        "before it are kept; the same command continues\n"
    )
