"""Execute notebooks in place and keep nothing of the machine in them.

    python tools/run_notebook.py experiments/*/notebook.ipynb

Each runs from a fresh kernel of this interpreter, in its own folder, and is written only when every cell succeeded.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300.0  # seconds a cell may take
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """A copy of `notebook` with the outputs of a run in `folder`; raises nbclient's CellExecutionError.

    The kernel sees this checkout's llamax, one CPU backend, and XLA as users have it (no flags of a test session).
    """
    copy = nbformat.from_dict(nbformat.reads(nbformat.writes(notebook), as_version=4))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "MPLBACKEND": _INLINE}
    client = NotebookClient(copy, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return copy


_INLINE = "module://matplotlib_inline.backend_inline"


def strip(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The same notebook without times, ids and paths of the machine that ran it; `folder` reads as `.`."""
    texts = re.sub(rf"{re.escape(str(folder.resolve()))}(?=[/\"'\\\s)]|$)", ".", nbformat.writes(notebook))
    clean = nbformat.reads(texts, as_version=4)
    clean.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(clean.cells):
        cell.metadata = nbformat.from_dict({})
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return clean


def main() -> None:
    """Run every notebook named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        began = time.perf_counter()
        done = strip(execute(nbformat.read(path, as_version=4), path.parent), path.parent)
        nbformat.write(done, path)
        print(f"{path}: {time.perf_counter() - began:.1f} s, {path.stat().st_size / 1e3:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
