"""Templates to text: every value is escaped, and an unknown name is an error."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from snpc.report.png import png_data_url

if TYPE_CHECKING:
    import jinja2


@cache
def template_environment() -> jinja2.Environment:
    """The templates of the package, with the filters that they use."""
    import jinja2  # here, so that `import snpc` does not load it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("snpc.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pixels"] = "{:.1f}".format
    environment.filters["shortest"] = "{:g}".format
    environment.filters["data_url"] = image_url
    return environment


def image_url(pixels: npt.ArrayLike) -> str:
    """A picture [height, width, 3] of 0..255 as a ``data:`` URL."""
    return png_data_url(np.array(pixels, np.uint8))


def render_template(template: str, **values: object) -> str:
    """Half a character (of a file name that is no UTF-8) becomes a question mark."""
    text = template_environment().get_template(template).render(**values)
    return text.encode(errors="replace").decode()
