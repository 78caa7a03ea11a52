"""`make notebooks`: executes the sources, saves notebooks with outputs."""

from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent
SOURCES = [file for file in FOLDER.glob("*.py") if file != Path(__file__)]


def read(source):
    """The notebook of a source in jupytext's percent format."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random otherwise: a change each time
    return notebook


def make_client(notebook):
    """Executes a notebook's cells in a kernel in the repository's root."""
    return nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER.parent)}},
        # What libraries in C++ print while they load goes to the terminal.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
    )


def main():
    """Writes a notebook beside each source."""
    for source in SOURCES:
        notebook = read(source)
        make_client(notebook).execute()
        # A warning tells where the package is on this machine.
        text = nbformat.writes(notebook).replace(f"{FOLDER.parent}/", "")
        source.with_suffix(".ipynb").write_text(text + "\n")


if __name__ == "__main__":
    main()
