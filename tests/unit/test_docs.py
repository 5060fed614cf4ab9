"""What the documents link to is there, and what they name in the agent's answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apagent.v1 import control_pb2 as pb

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path for pattern in ("*.md", "docs/*.md", "deploy/*.md") for path in sorted(ROOT.glob(pattern))
]
LINKS = [
    (path, target)
    for path in DOCUMENTS
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8"))
]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("document", "target"), LINKS, ids=[f"{path.name} {target}" for path, target in LINKS]
)
def test_what_a_document_links_to_is_there(document: Path, target: str) -> None:
    name, _, section = target.partition("#")
    path = document.parent / name if name else document
    assert path.exists()
    if section:
        assert section in sections(path)


def test_the_fields_to_monitor_are_in_the_answers() -> None:
    table = OPERATIONS.partition("## What to monitor")[2].partition("## ")[0]
    fields = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert {"in_sync", "degraded", "leaked_packets"} <= set(fields)
    assert set(fields) <= set(pb.Status.DESCRIPTOR.fields_by_name)
    of_peers = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\| `peers`: ([^|]+)", table, re.MULTILINE))
    )
    assert of_peers
    assert set(of_peers) <= set(pb.Peer.DESCRIPTOR.fields_by_name)


def sections(path: Path) -> set[str]:
    """The names by which a document's headings are linked to, as GitHub makes them."""
    text = re.sub(
        r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9_-]", "", heading.lower().replace(" ", "-")) for heading in headings}
