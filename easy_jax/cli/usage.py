"""The sub-commands, their options and the help pages. Imports only the standard library."""

import ast
import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """Error raised for an invalid command line; the message says what to type instead."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Help texts of a sub-command.

    Attributes:
      summary: one line for the list of commands.
      details: further lines for the command's own help page.
      examples: command lines without `easy-jax`.
      needs_config: whether `--config` is required.
    """

    summary: str
    details: str = ""
    examples: tuple[str, ...] = ()
    needs_config: bool = True


@dataclasses.dataclass(frozen=True)
class Option:
    """Help texts of a flag.

    Attributes:
      form: the flag as it is typed, such as `--workdir=DIR`.
      text: one line about what the flag does.
      command: the only sub-command that has the flag; empty if all experiment commands have it.
    """

    form: str
    text: str
    command: str = ""


_QUICKSTART = "--config=configs/quickstart.py"
_RUN = """\
Runs all steps that are not done yet: pre-training, linear probe, scoring, fine-tuning by every
method, evaluation, report. If it is interrupted, the same command continues. `run`, `compare`
and `report` are three names of one command."""

COMMANDS = {
    "run": Command(
        "everything: score, fine-tune by every method, evaluate, write report.html",
        _RUN,
        (
            f"run {_QUICKSTART}",
            f"run {_QUICKSTART}:clean --config.learning_rates=0.01,0.1",
            f"run {_QUICKSTART} --config.only=standard,flow --workdir=runs/two",
        ),
    ),
    "compare": Command(
        "the same as run",
        _RUN,
        ("compare --config=configs/resnet_transfer.py:resnet50,cifar10",),
    ),
    "report": Command(
        "the same as run; if everything is done, it only writes report.html again",
        _RUN,
        (f"report {_QUICKSTART}",),
    ),
    "score": Command(
        "everything up to the loss table; with images, pre-training and linear probe first",
        "Writes Parquet files with example_id, loss and count to loss_table/ in the workdir.",
        ("score --config=configs/smollm2_gsm.py",),
    ),
    "train": Command(
        "everything up to the checkpoints of every fine-tuning stage",
        "Writes one folder for each stage to checkpoints/ in the workdir.",
        (f"train {_QUICKSTART}",),
    ),
    "evaluate": Command(
        "everything up to the results of every method: results.json",
        "Measures what was learnt and what was forgotten; `report` also draws figures of it.",
        (f"evaluate {_QUICKSTART}",),
    ),
    "export": Command(
        "write each fine-tuned language model as a folder that transformers loads",
        "Runs the fine-tuning stages that are missing, and writes to exported/ in the workdir.",
        ("export --config=configs/smollm2_gsm.py",),
    ),
    "export-weights": Command(
        "write the scored training data with its weights, for other trainers",
        "Scores first if that has not been done. Writes exported/weights.parquet in the workdir:\n"
        "one row per example, with its texts, loss and weight, or lists of token weights.",
        (
            "export-weights --config=configs/smollm2_gsm.py",
            "export-weights --config=configs/smollm2_gsm.py --weighting=stm,threshold=0.3 "
            "--output=weights.jsonl",
        ),
    ),
    "compile": Command(
        "compile the steps for TPUs, without a TPU: does it fit, memory, time, collectives",
        "Needs no data, weights or TPU, only the TPU compiler: pip install 'easy-jax[tpu]'.\n"
        "The exit code is 1 if something does not fit.",
        (
            "compile --config=configs/metamath.py:gemma2_2b --topology=v5e:4x4",
            "compile --config=configs/metamath.py:gemma2_2b --topology=v5e:4x4 --program=train "
            "--largest_batch",
        ),
    ),
    "theory": Command(
        "check the paper's results on linear regression, and draw figures",
        "Takes under a minute. The exit code is 1 if a claim does not hold.",
        ("theory", "theory --workdir=runs/theory"),
        needs_config=False,
    ),
}

OPTIONS = {
    "config": Option(
        "--config=FILE.py[:ARG]", "the experiment: a Python file with get_config(ARG)"
    ),
    "config.FIELD": Option(
        "--config.FIELD=VALUE", "set a field of the experiment, such as --config.finetune.epochs=2"
    ),
    "workdir": Option("--workdir=DIR", "folder for all outputs (default: runs/NAME)"),
    "take-over": Option(
        "--take-over", "take the workdir from another run, if you know that it is gone"
    ),
    "coordinator_address": Option(
        "--coordinator_address=HOST:PORT", "with several processes: where process 0 listens"
    ),
    "num_processes": Option("--num_processes=N", "with several processes: their number"),
    "process_id": Option("--process_id=I", "with several processes: which one this is, from 0"),
    "peer_timeout": Option("--peer_timeout=SECONDS", "how long to wait for other processes (300)"),
    "weighting": Option(
        "--weighting=NAME[,OPTION=VALUE]", "of frozen losses, with its options", "export-weights"
    ),
    "output": Option("--output=FILE", "a .parquet or .jsonl file", "export-weights"),
    "topology": Option("--topology=KIND:SIZES", "the TPU chips, such as v5e:4x4", "compile"),
    "program": Option("--program=all|train|score", "which steps to compile (all)", "compile"),
    "largest_batch": Option(
        "--largest_batch", "also search for the largest batch that fits", "compile"
    ),
    "json": Option("--json", "print JSON instead of a table", "compile"),
}
_ALWAYS = (Option("--help", "show this help"), Option("--version", "show the version"))
_OF_A_RUN = ("take-over", "coordinator_address", "num_processes", "process_id", "peer_timeout")
_FOOT = """\
On TPU slices, GKE and SLURM, several processes find each other without options.
Exit codes: 0 finished, 2 a mistake for you to fix, 75 stopped after saving,
76 other processes are missing or lost, 130 Ctrl-C. README.md and docs/ have more."""


def help_text(command: str | None = None) -> str:
    """Returns the help page of a sub-command, or the overview of all of them.

    Raises:
      UsageError: there is no such sub-command.

    Example:
      >>> print(help_text("theory").splitlines()[0])
      usage: easy-jax theory [options]
    """
    if command is None:
        examples = [COMMANDS[name].examples[0] for name in ("run", "score", "compile", "theory")]
        parts = [
            "usage: easy-jax COMMAND [options]\n\n"
            "Fine-tuning without forgetting: weight examples by a frozen model's loss (FLOW).",
            _section("commands", [(name, each.summary) for name, each in COMMANDS.items()]),
            _section("options", _rows(OPTIONS)),
            _examples(examples),
            "easy-jax COMMAND --help shows the options and examples of a command.\n" + _FOOT,
        ]
    else:
        found = find_command(command)
        names = options_of(command)
        parts = [
            f"usage: easy-jax {command} {'--config=FILE.py ' * found.needs_config}[options]\n\n"
            f"{command}: {found.summary}.\n{found.details}".rstrip(),
            _section("options", _rows(names)),
            _examples(found.examples),
        ]
    return "\n\n".join(parts)


def options_of(command: str) -> list[str]:
    """Returns the names of the options that a sub-command has."""
    if command == "theory":
        return ["workdir"]
    names = [name for name, option in OPTIONS.items() if option.command in ("", command)]
    return [name for name in names if command != "compile" or name not in _OF_A_RUN]


def find_command(name: str) -> Command:
    """Returns a sub-command by its name.

    Raises:
      UsageError: there is no such sub-command; the message suggests the nearest name.

    Example:
      >>> find_command("trian")
      Traceback (most recent call last):
      easy_jax.cli.usage.UsageError: there is no command trian; did you mean train? \
(easy-jax --help)
    """
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name}{nearest(name, COMMANDS)} (easy-jax --help)")
    return COMMANDS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an unknown name's error message: the nearest known name, or all of them.

    Example:
      >>> nearest("epoch", ["seed", "epochs"])
      '; did you mean epochs?'
      >>> nearest("x", ["seed", "epochs"])
      '; there are seed, epochs'
    """
    known = list(known)
    return _meant(name, known) or f"; there are {', '.join(known)}"


def parse_weighting(text: str) -> tuple[str, dict[str, Any]]:
    """Parses `NAME,OPTION=VALUE,...`; values are Python literals or plain words.

    Raises:
      UsageError: a part after the name is not of the form `OPTION=VALUE`.

    Example:
      >>> parse_weighting("stm,threshold=0.3")
      ('stm', {'threshold': 0.3})
    """
    name, *parts = text.split(",")
    if not name:
        raise UsageError(f"--weighting={text} names no weighting, such as --weighting=flow")
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals or not option or not value:
            raise UsageError(
                f"--weighting={text}: {part!r} is no OPTION=VALUE, such as threshold=0.3"
            )
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return name, options


def unknown_flag(name: str) -> str:
    """Returns the error message for a flag that does not exist.

    Example:
      >>> unknown_flag("workdri")
      'there is no --workdri; did you mean workdir? (easy-jax --help)'
    """
    return f"there is no --{name}{_meant(name, OPTIONS)} (easy-jax --help)"


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _rows(names: Iterable[str]) -> list[tuple[str, str]]:
    rows = [(OPTIONS[name].form, OPTIONS[name].text) for name in names]
    return rows + [(option.form, option.text) for option in _ALWAYS]


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    """Formats two columns; a long entry of the first column is put on a separate line."""
    width = max(len(left) for left, _ in rows if len(left) <= 24)
    lines = [
        f"  {left:{width}}  {right}" if len(left) <= width else f"  {left}\n  {'':{width}}  {right}"
        for left, right in rows
    ]
    return "\n".join([f"{title}:", *lines])


def _examples(examples: Iterable[str]) -> str:
    return "\n".join(["examples:", *(f"  easy-jax {example}" for example in examples)])
