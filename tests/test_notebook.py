"""The quickstart notebook runs from top to bottom, at its small size."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path("notebooks", "01_quickstart.ipynb")


def test_the_notebook_is_stored_without_outputs(root: Path) -> None:
    for cell in nbformat.read(root / NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_the_notebook_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("EASY_JAX_SMALL", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a reader has it
    notebook = nbformat.read(root / NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises CellExecutionError, with the traceback, if a cell fails

    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    table = text[text.index("test accuracy in %") :].splitlines()
    assert [line.split()[0] for line in table[1:]] == [
        "before",
        "linear_probe",
        "probe_standard",
        "flow_no_head_stage",
        "trusting",
    ]
    for line in table[2:]:
        assert all(0.0 <= float(number) <= 100.0 for number in line.split()[1:])
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5  # letters, digits, histogram, extreme weights, scatter
