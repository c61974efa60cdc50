"""From matplotlib's SVG file to an element inside an HTML page: smaller, described, with tooltips."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

REFERENCE = re.compile(r"(^|url\()#([\w.-]+)")
"""To an identifier, in href="#a" or url(#a)."""
DROPPED = ("metadata", "style")
"""Elements that matter only in a file; the page has its own style."""
ANCHOR = re.compile(r"text-anchor: (\w+)")
"""All that is kept of a text's style: its font and color are the page's."""
LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
NUMERIC = ("d", "x", "y", "transform")


@dataclass(frozen=True)
class HotSpot:
    """A rectangle, in the SVG's units from its upper left corner, that shows ``text`` under the pointer."""

    x: float
    y: float
    width: float
    height: float
    text: str


def inline_svg(svg: bytes, name: str, description: str, hot_spots: Iterable[HotSpot]) -> str:
    """The root element of an SVG file as HTML text. name: makes its identifiers unique among those of a page."""
    root = ElementTree.fromstring(svg)
    values = [value for element in root.iter() for value in element.attrib.values()]
    referenced = {found[2] for value in values for found in REFERENCE.finditer(value)}
    for parent in list(root.iter()):
        for child in list(parent):
            if local_name(child.tag) in DROPPED:
                parent.remove(child)
    for element in root.iter():
        element.tag = local_name(element.tag)
        element.text, element.tail = visible(element.text), visible(element.tail)
        element.attrib = {local_name(key): value for key, value in element.attrib.items()}
        if element.get("id") not in referenced:
            element.attrib.pop("id", None)
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if element.tag == "text":
            anchor = ANCHOR.search(element.attrib.pop("style"))
            element.set("text-anchor", anchor[1] if anchor else "start")
        for key, value in element.attrib.items():
            element.attrib[key] = attribute(key, value, name)
    flatten(root)
    view_box = root.get("viewBox", "")
    root.attrib = {"viewBox": view_box, "role": "img", "aria-label": description}
    for spot in hot_spots:
        box = {"x": spot.x, "y": spot.y, "width": spot.width, "height": spot.height}
        area = ElementTree.SubElement(root, "rect", {"class": "spot"} | {key: f"{box[key]:.1f}" for key in box})
        ElementTree.SubElement(area, "title").text = spot.text
    return ElementTree.tostring(root, encoding="unicode")


def flatten(element: ElementTree.Element) -> None:
    """Replace groups without attributes by what they hold."""
    children: list[ElementTree.Element] = []
    for child in element:
        flatten(child)
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = children


def attribute(key: str, value: str, name: str) -> str:
    """An attribute as the page has it: numbers of one decimal, identifiers with the chart's name."""
    if key == "id":
        return f"{name}-{value}"
    if key in NUMERIC:
        return " ".join(LONG_NUMBER.sub(lambda found: f"{float(found[0]):.1f}", value).split())
    return REFERENCE.sub(rf"\1#{name}-\2", value)


def local_name(name: str) -> str:
    """Without the namespace, which an element inside HTML has from its parent."""
    return name.rsplit("}", 1)[-1]


def visible(text: str | None) -> str | None:
    """None for text that only indents the file."""
    return text if text and text.strip() else None
