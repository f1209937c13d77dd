"""Every notebook runs from top to bottom with FAST=1 in its own kernel, answers of exercises included.

They run one after the other beside all other tests (conftest.py starts them), on the second core.
"""
import json
import os
import re

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_notebook(path):
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:                                         # the answers of exercises run where they stand
        answers = re.findall(r"```python\n(.*?)```", cell.source, re.S) if cell.cell_type == "markdown" else []
        cells += [cell, *map(nbformat.v4.new_code_cell, answers)]
    notebook.cells = cells
    environment = os.environ | {"FAST": "1", "OMP_NUM_THREADS": "1"}    # a spinning neighbour must not slow the test
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute(env=environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, request):
    """Planted: an exercise with a wrong answer."""
    request.config.notebooks[path].result()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole(path):
    """All code cells were run in order, without an error, and no path of the author's machine shows."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not any(word in json.dumps(outputs) for word in ("/home/", "/root/", "/work/", "/tmp/"))
