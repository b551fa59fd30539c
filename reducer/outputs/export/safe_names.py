"""Names of files and folders that are safe everywhere, made from ids and labels whatever those hold. Pure.

Not pathvalidate (3.3.1): it lets ``..``, marks of direction, ``conin$`` and ``con .jpg`` pass and fails on lone
surrogates; names that differ only in case or composition, and digests, would remain here.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable

#: Characters that some file system or shell forbids or gives a meaning, and characters that cannot be seen.
UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"/\\|?*\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]')
#: Windows takes these for devices, in any case and whatever extension follows ("Naming Files, Paths, and Namespaces").
DEVICES = frozenset(
    [
        "con",
        "prn",
        "aux",
        "nul",
        "conin$",
        "conout$",
        *(f"{name}{n}" for name in ("com", "lpt") for n in "0123456789¹²³"),
    ]
)
#: Bytes of a name at most: most file systems take 255, and a file has a longer name before it is whole.
MOST_BYTES = 240
#: Bytes of an unsafe name that are kept, before the digest.
LEFT_BYTES = 120
#: Hexadecimal digits of the digest by which such names differ.
DIGITS = 8


def is_safe(name: str) -> bool:
    """Return whether a file or folder may have a name on any system, and then lies where it seems to lie."""
    return not (
        name in ("", ".", "..")
        or UNSAFE.search(name)
        or name != name.strip(" ")
        or name.endswith(".")
        or name.partition(".")[0].rstrip(" ").lower() in DEVICES
        or (name.startswith(".") and name.endswith(".tmp"))  # the name of a file before it is whole
        or len(name.encode()) > MOST_BYTES
    )


def made_safe(name: str, whole: str | None = None, digits: int = DIGITS) -> str:
    """Return a safe name that shows what it was made from.

    Parameters
    ----------
    name : str
        Name to resemble.
    whole : str, optional
        Text that the name stands for: names of different texts differ. Default ``name``.
    digits : int
        Hexadecimal digits of the digest (SHA-256) of ``whole`` at the end of the name.
    """
    shown = UNSAFE.sub("_", name).encode()[:LEFT_BYTES].decode(errors="ignore").strip(" .") or "_"
    digest = hashlib.sha256((name if whole is None else whole).encode("utf-8", "surrogatepass")).hexdigest()
    safe = f"{shown}-{digest[:digits]}"
    return safe if is_safe(safe) else f"_{safe}"  # the name of a device, whatever follows its first dot


def distinct_names(
    texts: Iterable[str],
    shown: Callable[[str], str] = str,
    *,
    forbidden: str = "",
    reserved: Collection[str] = (),
) -> dict[str, str]:
    """Return safe names, no two of them equal, not even where case and composition of characters are ignored.

    Parameters
    ----------
    texts : iterable of str
        Texts to be named. The names depend on the set of texts, not on their order.
    shown : callable
        From a text to the name that it should have.
    forbidden : str
        Further characters that no name may have.
    reserved : collection of str
        Names that no text may have, in lower case.

    Returns
    -------
    dict of str to str
        Name of each text: the one it should have wherever that is safe and unique, else one with a digest of the text.
    """
    masks = {ord(character): "_" for character in forbidden}
    names = {}
    for text in texts:
        name = shown(text)
        safe = is_safe(name) and name.lower() not in reserved and name == name.translate(masks)
        names[text] = name if safe else made_safe(name.translate(masks), text)
    digits = DIGITS
    while clashing := _clashing(names):
        digits *= 2
        names |= {text: made_safe(shown(text).translate(masks), text, digits) for text in clashing}
    return names


def _clashing(names: dict[str, str]) -> list[str]:
    folded = {text: unicodedata.normalize("NFC", name.casefold()) for text, name in names.items()}
    count = Counter(folded.values())
    if len(count) == len(names):
        return []
    return [text for text, name in folded.items() if count[name] > 1]


def safe_path(path: str, reserved: Collection[str] = ()) -> str:
    """Return a relative path that stays below the folder it is put into.

    Parameters
    ----------
    path : str
        Parts separated by ``/``.
    reserved : collection of str
        Names that nothing at the top may have, in lower case.

    Returns
    -------
    str
        The path itself where all of its parts are safe, else a safe one with a digest of the path in its name.
    """
    parts = path.split("/")
    if all(map(is_safe, parts)) and parts[0].lower() not in reserved:
        return path
    *folders, name = [part for part in parts if part.strip(" .")] or ["_"]
    safe = [part if is_safe(part) and part.lower() not in reserved else made_safe(part) for part in folders]
    return "/".join([*safe, with_digest(name, path)])


def with_digest(name: str, whole: str) -> str:
    """Return a file's name with a digest of the text that it stands for before its extension."""
    stem, dot, extension = name.rpartition(".")
    if dot and stem and re.fullmatch(r"[A-Za-z0-9]{1,8}", extension):
        return f"{made_safe(stem, whole)}.{extension}"
    return made_safe(name, whole)
