"""Templates filled in: the page of the report, and a run shown in a notebook."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import jinja2

from reducer.formatting import SHOWN_CHARACTERS, clip, format_bytes, format_duration
from reducer.outputs.report.wording import quality_rows, quality_title


def as_html(template: str, **context: Any) -> str:
    """Return one of the templates of this package, filled in; whatever comes from outside is escaped.

    Parameters
    ----------
    template : str
        Name of a file in ``templates/``.
    **context
        Variables of the template; one that is missing is an error.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": format_bytes,
        "duration": format_duration,
        "clip": clip,
        "number": format_number,
        "of": format_count,
        "place": without_secrets,
        "quality_rows": quality_rows,
        "quality_title": quality_title,
    }
    text = files("reducer.outputs.report").joinpath("templates", template).read_text("utf-8")
    return environment.from_string(text).render(context)


def without_secrets(text: object, most: int = SHOWN_CHARACTERS) -> str:
    """Return a clipped text, its URLs without user names, passwords and queries, which may be secret.

    Parameters
    ----------
    text : object
        Text that may hold URLs.
    most : int
        Characters at most.
    """
    return clip(re.sub(r"(://[^\s?]*\?)[^\s']*", r"\1…", re.sub(r"://[^\s/?@]*@", "://", str(text))), most)


def format_number(value: float) -> str:
    """Return a number with separators of thousands, and one decimal place if it is not whole."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def format_count(count: float | str, what: str) -> str:
    """Return a count with its noun, such as ``1 photo`` or ``2,000 photos``.

    Parameters
    ----------
    count : float or str
        The number, or the number as text.
    what : str
        The noun in the singular.
    """
    shown = count if isinstance(count, str) else format_number(count)
    return f"{shown} {what}{'' if shown == '1' else 's'}"
