"""Notebooks, run as Jupyter runs them: in a kernel of their own, in the folder that they lie in.

    python tests/notebooks.py docs/how-to/notebook.ipynb

runs a notebook in a copy of the project, and writes into it what its cells print and return.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
COLOUR = re.compile(r"\x1b\[[\d;]*m")


@dataclass
class Executed:
    """A notebook that has run.

    Attributes:
        cells: Its cells, with all that they put out.
        displays: What was displayed, state by state, as `display_data` or `update_display_data`.
    """

    cells: list[Any]
    displays: list[tuple[str, str]] = field(default_factory=list)

    def streams(self, name: str) -> str:
        """Return what all cells wrote to `stdout` or `stderr`."""
        outputs = [output for cell in self.cells for output in cell.get("outputs", ())]
        return "".join(output["text"] for output in outputs if output.get("name") == name)


def executed(notebook: Path) -> Executed:
    """Run all cells of a notebook; what one of them raises is raised."""
    read = nbformat.read(notebook, as_version=4)
    result = Executed(read.cells)
    client = NotebookClient(
        read, timeout=60, kernel_name="python3", resources={"metadata": {"path": notebook.parent}}
    )
    manager = client.create_kernel_manager()
    process = client.process_message

    def noting(message: dict[str, Any], cell: Any, index: int) -> Any:
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown = message["content"]["data"].get("text/plain", "")
            result.displays.append((message["msg_type"], shown))
        return process(message, cell, index)

    client.process_message = noting
    # Files in the place of ports, which may be taken, or not allowed. Their paths are short.
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        manager.transport, manager.ip = "ipc", str(Path(folder, "socket"))
        client.execute()
    return result


def read_outputs(cell: Any) -> Iterator[str]:
    """Yield what a cell printed and returned; what went to stderr passes by."""
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream" and output["name"] == "stdout":
            yield COLOUR.sub("", output["text"])
        elif output["output_type"] == "execute_result":
            yield output["data"]["text/plain"] + "\n"


def copied_project(place: Path) -> Path:
    """Return a copy of the example project, with the documentation, at `place`."""
    ignored = shutil.ignore_patterns("__pycache__", "_build")
    for folder in ("src/example_project", "docs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def write_outputs(notebook: Path) -> None:
    """Write what the cells of a notebook put out to be read into it."""
    with tempfile.TemporaryDirectory() as folder:
        place = copied_project(Path(folder) / "torch-lab")
        result = executed(place / notebook.resolve().relative_to(ROOT))
    read = nbformat.read(notebook, as_version=4)
    for cell, ran in zip(read.cells, result.cells, strict=True):
        if cell.cell_type == "code":
            text = "".join(read_outputs(ran))
            output = nbformat.v4.new_output("stream", name="stdout", text=text)
            cell.outputs, cell.execution_count = [output] if text else [], None
    nbformat.write(read, notebook)


if __name__ == "__main__":
    write_outputs(Path(sys.argv[1]))
