"""Vega-Lite, the library that draws the report's charts, in a page and as files. The one import of vl_convert."""

import functools
import json
from typing import Any

import vl_convert

VERSION = "6.4"
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_FILE_WIDTH = 640
_PNG_SCALE = 2.0


@functools.cache
def script() -> str:
    """JavaScript that draws without a network: ``window.vegaEmbed``."""
    text = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION))
    # An end of the element it stands in could only be inside one of its strings.
    return text.replace("</script", "<\\/script")


def svg(spec: dict[str, Any]) -> str:
    """A chart as SVG."""
    return str(vl_convert.vegalite_to_svg(_for_a_file(spec), vl_version=VERSION))


def png(spec: dict[str, Any]) -> bytes:
    """A chart as PNG, two pixels a point."""
    return bytes(vl_convert.vegalite_to_png(_for_a_file(spec), vl_version=VERSION, scale=_PNG_SCALE))


def _for_a_file(spec: dict[str, Any]) -> str:
    """On paper a chart has a width and a ground."""
    return json.dumps({**spec, "width": _FILE_WIDTH, "background": "white"})
