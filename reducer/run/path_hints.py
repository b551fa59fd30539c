"""Why photos are not where their paths say: a change by which they would be found."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from urllib.parse import unquote

from reducer.storage.location import is_url

#: Missing photos that a change has to find.
TRIED = 20


def _padded(width: int) -> Callable[[str], str]:
    """Return a change that writes numbers at the beginning of file names with so many digits."""

    def change(path: str) -> str:
        folder, name = os.path.split(path)
        return os.path.join(folder, re.sub(r"^\d+", lambda number: number[0].zfill(width), name))

    return change


#: Changes of paths, by what a message calls them.
CHANGES: dict[str, Callable[[str], str]] = {
    "with / in the place of \\": lambda path: path.replace("\\", "/"),
    "with %20 and the like decoded": unquote,
    "in the Unicode form NFC": lambda path: unicodedata.normalize("NFC", path),
    "in the Unicode form NFD": lambda path: unicodedata.normalize("NFD", path),
    "with an extension that stands twice only once": lambda path: re.sub(r"(\.\w+)\1$", r"\1", path),
    "with folders that stand twice only once": lambda path: re.sub(r"/(.+?)/\1/", r"/\1/", path),
    "with .jpg behind": lambda path: f"{path}.jpg",
    "with .jpg for an ending": lambda path: f"{os.path.splitext(path)[0]}.jpg",
    "with .JPG for an ending": lambda path: f"{os.path.splitext(path)[0]}.JPG",
    **{f"with numbers of {width} digits, zeros before them": _padded(width) for width in range(2, 17)},
}


def path_hint(paths: Sequence[str]) -> str | None:
    """Find a change by which photos that are missing would be found.

    Parameters
    ----------
    paths : sequence of str
        Paths of missing photos; the first `TRIED` local ones are tried.

    Returns
    -------
    str or None
        A sentence; None where no one change finds them all.
    """
    missing = [path for path in paths if not is_url(path)][:TRIED]
    for what, change in CHANGES.items():
        changed = [change(path) for path in missing]
        if missing and all(new != old and os.path.isfile(new) for new, old in zip(changed, missing, strict=True)):
            count = "the missing photo is" if len(missing) == 1 else f"the first {len(missing)} missing photos are"
            return f"{count} found {what}: {changed[0]}"
    return None
