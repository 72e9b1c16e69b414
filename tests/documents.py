"""What tests ask of documents."""

import json
import re
from pathlib import Path

MACHINE_PATH = re.compile(
    r"(?<![\w.~*$}/-])/(?:home|root|work|tmp|Users|opt|mnt|srv)/\w"
)  # a folder of one machine


def text_of(document: Path) -> str:
    """The text of a Markdown file or of a notebook's Markdown cells."""
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def headings(document: Path) -> set[str]:
    """Those of a document, as GitHub writes them in links."""
    titles = re.findall(r"^#+ (.*)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
