"""What `easy-jax` says before it runs anything: help, version, and mistakes on the command line."""

import re
import resource
import subprocess
import sys

import pytest
from absl import flags

from easy_jax.cli import config_file, main, usage
from easy_jax.cli.usage import COMMANDS, OPTIONS, UsageError
from easy_jax.config import ConfigError, InstructionsConfig, LanguageConfig, MethodConfig

QUICKSTART = "--config=configs/quickstart.py:tiny"
LANGUAGE = "--config=configs/smollm2_gsm.py"


@pytest.fixture
def parse(root, monkeypatch):
    """Parses a command line as the program does, in the top folder, and forgets it again."""
    monkeypatch.chdir(root)

    def forget():
        for name in list(flags.FLAGS):
            if name.startswith("config."):
                delattr(flags.FLAGS, name)
        for name in OPTIONS:
            if name in flags.FLAGS:
                flags.FLAGS[name].unparse()
                flags.FLAGS[name].present = 0
        flags.FLAGS.unparse_flags()

    def run(*arguments):
        forget()
        monkeypatch.setattr(sys, "argv", ["easy-jax", *arguments])
        command = main.parse(sys.argv)
        return command, config_file.frozen(main._CONFIG.value)

    yield run
    forget()


def easy_jax(root, *arguments, timeout=60):
    """Exit code, output and complaint of the command, in a process."""
    done = subprocess.run(
        [sys.executable, "-m", "easy_jax.main", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_help_is_quick_and_imports_nothing_heavy(root):
    code = (
        "import sys; from easy_jax.main import cli; sys.argv = ['easy-jax', '--help']; cli()\n"
        "heavy = {'jax', 'flax', 'numpy', 'matplotlib', 'tensorflow_datasets'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # seconds
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == usage.help_text()


def test_help_has_every_command_and_fits_a_terminal():
    page = usage.help_text()
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", page, re.MULTILINE)
    for name in (None, *COMMANDS):
        assert max(map(len, usage.help_text(name).splitlines())) <= 110


def test_help_of_a_command_has_its_options_and_examples():
    assert "--topology" in usage.help_text("compile")
    assert "--topology" not in usage.help_text("run")
    assert "--num_processes" not in usage.help_text("compile")
    assert "--config=FILE.py" not in usage.help_text("theory")
    for name, command in COMMANDS.items():
        for example in command.examples:
            assert f"  easy-jax {example}" in usage.help_text(name)


def test_every_flag_is_in_the_help_and_every_option_is_a_flag():
    ours = {flag.name for flag in flags.FLAGS.get_flags_for_module("easy_jax.cli.main")}
    ours |= {flag.name for flag in flags.FLAGS.get_flags_for_module("easy_jax.cli.config_file")}
    ours = {name.replace("_", "-") for name in ours if "." not in name}  # an alias is written so
    assert {name.replace("_", "-") for name in OPTIONS} - {"config.FIELD"} == ours


def test_the_readme_has_the_same_commands(root):
    table = (root / "README.md").read_text().partition("## The command line")[2]
    rows = [
        line.split("|")[1]
        for line in table.partition("`easy-jax --help`")[0].splitlines()
        if "|" in line
    ]
    named = {word for row in rows for word in re.findall(r"`(?:easy-jax )?([\w-]+)`", row)}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_typed(name, parse):
    for example in COMMANDS[name].examples:
        assert parse(*example.split())[0] == name


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--help"], None),
        (["-h"], None),
        (["help"], None),
        (["--workdir=x", "--help"], None),
        (["run", "--help"], "run"),
        (["help", "run"], "run"),
        (["--help", "theory"], "theory"),
        (["run", "--config=nope.py", "-help"], "run"),
    ],
)
def test_ways_to_ask_for_help(arguments, asked):
    assert main.information(arguments) == usage.help_text(asked)


@pytest.mark.slow
def test_version(root):
    code, out, err = easy_jax(root, "--version")
    assert (code, err) == (0, "") and re.fullmatch(r"easy-jax \d+\.\d+\.\d+\n", out)


def test_without_help_there_is_something_to_run():
    assert main.information(["run", QUICKSTART]) is None
    assert main.information(["run", "--", "--help"]) is None


def test_flags_before_and_after_the_command(parse):
    for arguments in (
        ("run", QUICKSTART, "--workdir=w", "--config.seeds=3,4"),
        (QUICKSTART, "--config.seeds=3,4", "--workdir", "w", "run"),
        ("--workdir=w", "run", QUICKSTART, "--config.seeds=3", "--config.seeds=4"),
        ("-workdir=w", "run", "--config", "configs/quickstart.py:tiny", "-config.seeds", "(3, 4)"),
    ):
        command, config = parse(*arguments)
        assert (command, main._WORKDIR.value, config.seeds) == ("run", "w", (3, 4))


def test_overrides_of_every_type(parse):
    names = "standard,wise_ft_0.5"
    methods = tuple(MethodConfig(name) for name in names.split(","))
    assert config_file.Entries().parse(names) == tuple(method.name for method in methods)
    _, config = parse(
        "run",
        QUICKSTART,
        "--config.only=standard,flow",
        "--config.learning_rates=0.1,1",
        "--config.finetune.optimizer.learning_rate=1e-3",
        "--config.finetune.epochs=3",
        "--config.keep_best",
        "--config.methods[0].weighting=flow",
        "--config.scoring.on_bad_example",
        "drop",
    )
    assert config.only == ("standard", "flow") and config.learning_rates == (0.1, 1)
    assert config.finetune.optimizer.learning_rate == 1e-3 and config.finetune.epochs == 3
    assert config.keep_best and config.methods[0].weighting == "flow"
    assert config.scoring.on_bad_example == "drop"


def test_a_name_with_a_dot_and_a_number_is_a_name(parse):
    _, config = parse(
        "run", "--config=configs/quickstart.py:compare", "--config.only=standard,wise_ft_0.9"
    )
    assert [method.name for method in config.selected_methods()] == ["standard", "wise_ft_0.9"]


MISTAKES = {
    "no_command": ("", r"no command given; choose from run, .*theory \(easy-jax --help\)"),
    "unknown_command": ("trian", "there is no command trian; did you mean train"),
    "two_commands": ("run train QUICK", "unexpected argument 'train'"),
    "file_alone": ("run a.py:b", "unexpected argument 'a.py:b'; give a file as --config=a.py:b"),
    "two_files": ("run QUICK LANGUAGE", "--config is given twice"),
    "no_config": ("run", "run needs --config=FILE.py, such as: easy-jax run --config="),
    "no_config_but_a_field": ("run --config.seeds=3", "--config.seeds needs --config=FILE"),
    "no_topology": ("compile QUICK", "compile needs --topology, such as"),
    "not_of_this_command": ("run QUICK --topology=v5e:2x2", "run has no --topology"),
    "config_of_theory": ("theory QUICK", "theory has no --config"),
    "unknown_flag": ("run QUICK --workdri=w", "no --workdri; did you mean workdir"),
    "number": ("run QUICK --num_processes=two", "--num_processes=two: invalid literal"),
    "choice": ("compile QUICK --program=half", r"--program=half.*all\|train\|score"),
    "file": ("run --config=configs/quickstrat.py", "did you mean configs/quickstart.py"),
    "folder": ("run --config=configs", "--config=configs is not a file"),
    "empty_file_name": ("run --config=", "--config= is not a file"),
    "field": (
        "run QUICK --config.finetune.epoch=1",
        r"config.finetune \(StageConfig\) has no field epoch; did you mean epochs",
    ),
    "index": (
        "run LANGUAGE --config.heldout[7].path=",
        r"config.heldout\[7\] does not exist: config.heldout ends with \[0\]",
    ),
    "empty_path": (
        "run LANGUAGE --config.heldout[0].format=jsonl --config.heldout[0].path=",
        r"config.heldout\[0\].path is ''; it must be a file or folder",
    ),
    "index_of_no_list": ("run QUICK --config.name[0]=x", "config.name is .*, not a list"),
    "field_of_no_group": ("run QUICK --config.name.x=1", "it has no field x"),
    "part_of_a_list": ("run QUICK --config.seeds[0]=1", "give all .*--config.seeds=A,B"),
    "group": ("run QUICK --config.finetune=1", "such as --config.finetune.epochs"),
    "group_of_list": ("run QUICK --config.methods=flow", r"--config.methods\[0\]"),
    "no_path": ("run QUICK --config.seeds[a]=1", r"--config.seeds\[a\] is not a field"),
    "no_number": ("run QUICK --config.eval_batch_size=", "eval_batch_size=: invalid"),
    "element": ("run QUICK --config.learning_rates=a", "learning_rates is 'a'; it must be"),
    "no_element": ("run QUICK --config.learning_rates=0.1,,1", "learning_rates is ''; it must"),
    "no_value": ("run QUICK --config.name", "Missing value for flag --config.name"),
    "no_flagfile": ("run --flagfile=nope", "nope"),
    "literal": ("run QUICK --config.scoring.on_bad_example=x", "is 'x'; it must be one of"),
    "too_late": ("run --config.seeds=1 QUICK", "before a value for --config"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, parse):
    arguments, message = MISTAKES[name]
    with pytest.raises((UsageError, ConfigError), match=message) as raised:
        parse(*arguments.replace("QUICK", QUICKSTART).replace("LANGUAGE", LANGUAGE).split())
    assert len(str(raised.value).splitlines()) == 1


FILES = {
    "not_python": ("x = 1\ndef get_config(:\n", r"config.py, line 2: invalid Python: "),
    "raises": (
        "import math\n\ndef get_config():\n  return math.sqrt(-1)\n",
        r"config.py, line 4: ValueError: ",
    ),
    "import": ("import no_such_module\n", r"config.py, line 1: ModuleNotFoundError: No module"),
    "no_function": ("config = 3\n", r"config.py has no function get_config"),
    "other_type": ("def get_config():\n  return {}\n", r"returns dict; it must be an Exper"),
    "nothing": ("def get_config():\n  pass\n", r"returns NoneType; it must be"),
    "takes_none": ("def get_config():\n  pass\n", r"TypeError: get_config\(\) takes 0", ":arg"),
    "lines": ("raise RuntimeError('two\\nlines')\n", r"line 1: RuntimeError: two lines$"),
    "nul": ("x = '\0'\n", r"config.py.*null bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_file_that_fails(name, parse, tmp_path):
    content, message, *argument = FILES[name]
    path = tmp_path / "config.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        parse("run", f"--config={path}{''.join(argument)}")
    assert str(path) in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_an_index_of_an_empty_list():
    config = LanguageConfig(train=InstructionsConfig(path="data.jsonl"))
    with pytest.raises(ConfigError, match=r"heldout\[0\] does not exist: .*is empty in the file"):
        config_file.check_override(config, "config.heldout[0].path")


def test_a_mistake_ends_the_process_with_2(root):
    code, out, err = easy_jax(root, "run", "--config=nope.py")
    assert (code, out, err) == (2, "", "easy-jax: there is no file nope.py\n")


def test_a_warning_is_one_line_and_said_once(capsys):
    show = main._Warnings()
    for message in ("two\n  lines", "two\n  lines", "another"):
        show(UserWarning(message), UserWarning, "file.py", 3, line="source")
    err = "easy-jax: warning: two lines\neasy-jax: warning: another\n"
    assert capsys.readouterr() == ("", err)


def test_an_assignment_to_a_field_is_told_how_to_be_written(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from easy_jax.config import ExperimentConfig\n"
        "def get_config():\n"
        "    config = ExperimentConfig()\n"
        "    config.finetune.epochs = 3\n"
        "    return config\n"
    )
    with pytest.raises(ConfigError, match=r"mine\.py, line 4: .*'epochs': .*config = replace\("):
        config_file.read(str(path))
