"""What `easy-jax --help` says: the sub-commands and their options. Imports nothing but Python."""

import dataclasses
import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A command line that cannot be meant; the message says what to type instead."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
      summary: one line.
      details: for its own help page.
      examples: command lines after `easy-jax`.
      needs_config: whether it is about an experiment.
    """

    summary: str
    details: str = ""
    examples: tuple[str, ...] = ()
    needs_config: bool = True


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag: how it is written, what it does, and the only sub-command that has it, if any."""

    form: str
    text: str
    command: str = ""


_QUICKSTART = "--config=configs/quickstart.py"
_RUN = """\
Does what is left of: pre-training, linear probe, scoring, fine-tuning by every method,
evaluation, report. Whatever stops it, the same command again continues. `run`, `compare`
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
        "the same as run: where all is done, it writes report.html again",
        _RUN,
        (f"report {_QUICKSTART}",),
    ),
    "score": Command(
        "up to the loss table: pre-training and linear probe of images, then scoring",
        "Writes loss_table/ of the workdir: Parquet with example_id, loss and count.",
        ("score --config=configs/smollm2_gsm.py",),
    ),
    "train": Command(
        "up to the checkpoints of every fine-tuning stage",
        "Writes checkpoints/ of the workdir, a folder for each stage.",
        (f"train {_QUICKSTART}",),
    ),
    "evaluate": Command(
        "up to the results of every method: results.json",
        "Measures what was learnt and what was forgotten; `report` draws it, too.",
        (f"evaluate {_QUICKSTART}",),
    ),
    "export": Command(
        "of a language model: a folder that transformers loads, for each method",
        "Fine-tunes what is not yet fine-tuned, and writes exported/ of the workdir.",
        ("export --config=configs/smollm2_gsm.py",),
    ),
    "compile": Command(
        "compile for TPUs that are not there: does it fit, memory, time, collectives",
        "Needs no data, no weights and no TPU, but TPU's compiler: pip install 'easy-jax[tpu]'.\n"
        "The exit code is 1 if something does not fit.",
        (
            "compile --config=configs/gemma2_2b_metamath.py --topology=v5e:4x4",
            "compile --config=configs/gemma2_2b_metamath.py --topology=v5e:4x4 --program=train "
            "--largest_batch",
        ),
    ),
    "theory": Command(
        "check the paper's linear regression, claim by claim, and draw it",
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
        "--config.FIELD=VALUE", "another value of a field, such as --config.finetune.epochs=2"
    ),
    "workdir": Option("--workdir=DIR", "folder of all outputs (default: runs/ and the name)"),
    "take-over": Option("--take-over", "take the folder from a run that is known to be gone"),
    "coordinator_address": Option(
        "--coordinator_address=HOST:PORT", "of several processes: where process 0 is"
    ),
    "num_processes": Option("--num_processes=N", "how many there are"),
    "process_id": Option("--process_id=I", "which of them this one is, from 0"),
    "peer_timeout": Option("--peer_timeout=SECONDS", "how long to wait for the others (300)"),
    "topology": Option("--topology=KIND:SIZES", "the chips, such as v5e:4x4", "compile"),
    "program": Option("--program=all|train|score", "which steps to compile (all)", "compile"),
    "largest_batch": Option("--largest_batch", "also the largest batch that fits", "compile"),
    "json": Option("--json", "print JSON, not a table", "compile"),
}
_ALWAYS = (Option("--help", "this text"), Option("--version", "the version"))
_OF_A_RUN = ("take-over", "coordinator_address", "num_processes", "process_id", "peer_timeout")
_FOOT = """\
Several processes find each other on TPU slices, GKE and SLURM without options.
README.md and docs/ tell more; exit codes: 0 done, 2 something for you to mend,
75 stopped and saved, 130 Ctrl-C."""


def help_text(command: str | None = None) -> str:
    """The help page of a sub-command, or of all of them.

    Raises:
      UsageError: no such sub-command.

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
            "easy-jax COMMAND --help has the options and examples of a command.\n" + _FOOT,
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
    """The names of the options that a sub-command has."""
    if command == "theory":
        return ["workdir"]
    names = [name for name, option in OPTIONS.items() if option.command in ("", command)]
    return [name for name in names if command != "compile" or name not in _OF_A_RUN]


def find_command(name: str) -> Command:
    """A sub-command by its name.

    Raises:
      UsageError: there is none of that name; the nearest is named.

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
    """The end of a message about an unknown name: what it may be meant to be, or what there is.

    Example:
      >>> nearest("epoch", ["seed", "epochs"])
      '; did you mean epochs?'
      >>> nearest("x", ["seed", "epochs"])
      '; there are seed, epochs'
    """
    known = list(known)
    return _meant(name, known) or f"; there are {', '.join(known)}"


def unknown_flag(name: str) -> str:
    """The message about a flag that does not exist.

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
    """Two columns; what is too long for the first has a line of its own."""
    width = max(len(left) for left, _ in rows if len(left) <= 24)
    lines = [
        f"  {left:{width}}  {right}" if len(left) <= width else f"  {left}\n  {'':{width}}  {right}"
        for left, right in rows
    ]
    return "\n".join([f"{title}:", *lines])


def _examples(examples: Iterable[str]) -> str:
    return "\n".join(["examples:", *(f"  easy-jax {example}" for example in examples)])
