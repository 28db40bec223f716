"""The notebooks as programs: run them, keep their outputs, make README.md from the index.

python tests/notebooks.py --write [NAME ...]   run notebooks (all by default) and store their outputs
python tests/notebooks.py --readme             README.md from nbs/index.ipynb
"""
import os
import re
import sys
import tempfile

import nbformat

from running import ROOT, environment


def notebooks(): return sorted(p for p in (ROOT / "nbs").glob("**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def execute(path, folder=None, timeout=1800):
    "Run a notebook from top to bottom in an empty folder; returns it with its outputs. A cell that fails raises."
    from nbclient import NotebookClient
    book = nbformat.read(path, as_version=4)
    threads = max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    env = environment(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")          # threads that wait must not keep others from working
    with tempfile.TemporaryDirectory() as own:
        NotebookClient(book, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder or own)}}, store_widget_state=False).execute(env=env)
    return book


def _output_only(cell):
    "A cell that makes text: only what it makes is shown."
    return nbformat.v4.new_markdown_cell("\n".join(o["data"]["text/markdown"] for o in cell.outputs))


def readme(path=ROOT / "nbs" / "index.ipynb"):
    "README text: the index notebook as Markdown, without hidden cells and directives."
    from nbconvert import MarkdownExporter
    book = nbformat.read(path, as_version=4)
    book.cells = [c for c in book.cells if not re.search(r"^#\| *hide\b", c.source, re.M)]
    book.cells = [_output_only(c) if re.search(r"^#\| *echo: *false\b", c.source, re.M) else c for c in book.cells]
    for cell in book.cells: cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    text, _ = MarkdownExporter().from_notebook_node(book)
    text = re.sub(r"\]\((\d\d_|tutorials/)", r"](nbs/\1", re.sub(r"\]\(\.\./(docs|bench)/", r"](\1/", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    if "--readme" in sys.argv: (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    if "--write" in sys.argv:
        names = [a for a in sys.argv[1:] if not a.startswith("--")]
        for path in notebooks():
            if names and path.stem not in names: continue
            nbformat.write(execute(path), path)
            print("ran", path.relative_to(ROOT))
