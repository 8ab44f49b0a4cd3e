"""Run the notebooks of this folder and save their outputs: ``python run_notebooks.py [NAME.ipynb ...]``.

Outputs are made with one thread, offline, and without the C++ kernel, so that they do not depend on a compiler; what
changes from run to run (times, versions) is not saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
COMMAND = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_LONGCTX_NATIVE": "0",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class ThisPython(KernelSpecManager):
    """Every kernel is the Python that runs this; what is installed on the machine is not asked."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(argv=COMMAND, **{key: KERNEL[key] for key in ("display_name", "language")})


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def run(path: Path, seconds: int = 600) -> NotebookNode:
    """The notebook with fresh outputs, run in an empty folder.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = cleaned(nbformat.read(path, as_version=4))
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        times = {"timeout": seconds, "startup_timeout": seconds, "record_timing": False}
        client = NotebookClient(notebook, km=manager, resources=where, coalesce_streams=True, **times)
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        client.execute(env={**os.environ, **SETTINGS, "PYTHONPATH": paths})
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Without what changes from run to run: cells keep what they say and show, and are counted from 1."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    code = 0
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", NotebookNode()
        if cell.cell_type != "code":
            continue
        code += 1
        cell.execution_count = code
        cell.outputs = [output for output in cell.outputs if not is_torchao(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = code
            if "metadata" in output:
                output.metadata = NotebookNode()
    return notebook


def is_torchao(output: NotebookNode) -> bool:
    """Whether all of it is what torchao, where it is installed, says as Transformers imports it."""
    lines = output.text.splitlines() if output.output_type == "stream" and output.name == "stderr" else ["other"]
    return all("torchao" in line or "torch/utils/_pytree.py" in line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path, nargs="*", help="default: all of this folder")
    for path in parser.parse_args().notebook or notebooks():
        nbformat.write(run(path), path)
        sys.stderr.write(f"{path.name}: {path.stat().st_size / 1000:.0f} kB\n")


if __name__ == "__main__":
    main()
