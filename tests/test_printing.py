"""What is printed and written is the text that it is, in any locale."""

import ast
import io
import sys

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from easy_jax.io import files
from easy_jax.io.terminal import Terminal, plain_console, print_whatever_the_encoding
from easy_jax.report import figures

ODD = "x[/red]y [bold] :fire: [link=a]"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_printed_is_read_as_markup(is_terminal):
    file = io.StringIO()
    console = plain_console(file=file, width=200, force_terminal=is_terminal, color_system=None)
    with Terminal(console) as terminal:
        terminal.start({"fit": 3})
        terminal.describe(f"stage {ODD}")
        terminal.print(f"message {ODD}")
        table = Table(f"header {ODD}", title=f"title {ODD}", caption=f"caption {ODD}")
        table.add_row(f"cell {ODD}")
        terminal.print(table)
    shown = ["message", "header", "title", "caption", "cell", *(["stage"] if is_terminal else [])]
    for what in shown:
        assert f"{what} {ODD}" in file.getvalue()


def test_what_an_output_cannot_encode_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", "strict"))
    print_whatever_the_encoding()
    plain_console().print("Δ [x]")
    print("é", flush=True)
    assert written.getvalue() == b"\\u0394 [x]\n\\xe9\n"


def test_half_a_character_of_a_files_name_is_written_as_its_escape(tmp_path):
    files.write(tmp_path / "results.md", "Δ caf\udce9")
    assert (tmp_path / "results.md").read_bytes() == "Δ caf\\udce9".encode()


def test_names_in_figures_are_no_formulas():
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], label="$\\broken{$")
    axis.set_title("$x^2$")
    figure.legend()
    svg = figures.to_svg(figure)
    assert "<!-- $x^2$ -->" in svg and "<!-- $\\broken{$ -->" in svg


def _of_the_locale(code):
    """Lines that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(key.arg == "encoding" for key in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("read_text", "write_text"):
            if len(node.args) < 1 + (name == "write_text"):
                yield node.lineno
        elif name == "open":
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            if any(mode in ("r", "w", "a", "x", "r+") for mode in modes):
                yield node.lineno


@pytest.mark.slow
def test_no_file_depends_on_the_locale(root):
    assert [*_of_the_locale('p.read_text()\np.open("w")\nopen(p, "wb")\np.read_text("utf-8")')] == [
        1,
        2,
    ]
    for folder in ("easy_jax", "scripts", "benchmarks", "configs"):
        for path in (root / folder).rglob("*.py"):
            assert not [*_of_the_locale(path.read_text("utf-8"))], path
