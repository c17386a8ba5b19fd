"""HTML as a tree: what is put in is escaped, and every tag that is opened is closed."""

from __future__ import annotations

from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str | None


def make_element(tag: str, attributes: dict[str, str] | None = None, *children: Child) -> Element:
    """An element; children that are None are left out."""
    made = Element(tag, attributes or {})
    for child in children:
        append_child(made, child)
    return made


def append_child(parent: Element, child: Child) -> None:
    if isinstance(child, str) and len(parent):
        parent[-1].tail = (parent[-1].tail or "") + child
    elif isinstance(child, str):
        parent.text = (parent.text or "") + child
    elif child is not None:
        parent.append(child)


def document_text(root: Element) -> str:
    """A whole document. Half a character (of a file name that is no UTF-8) becomes a question mark."""
    text: str = ElementTree.tostring(root, encoding="unicode", method="html", short_empty_elements=False)
    return "<!DOCTYPE html>\n" + text.encode(errors="replace").decode() + "\n"
