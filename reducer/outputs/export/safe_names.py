"""Names of files and folders that are safe everywhere, made from ids and labels whatever those hold. Pure."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable

#: What some file system or shell forbids or takes for something else, and characters that cannot be seen.
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
#: Bytes of a name at most: most file systems take 255, and a file has a longer one before it is whole.
MOST_BYTES = 240
#: Bytes that are left of a name that is not safe, before the digest.
LEFT_BYTES = 120
#: Hexadecimal digits of the digest that tells such names apart.
DIGITS = 8


def is_safe(name: str) -> bool:
    """Whether a file or folder may be called so on any system, and is where it seems to be."""
    return not (
        name in ("", ".", "..")
        or UNSAFE.search(name)
        or name != name.strip(" ")
        or name.endswith(".")
        or name.partition(".")[0].rstrip(" ").lower() in DEVICES
        or (name.startswith(".") and name.endswith(".tmp"))  # what a file is called before it is whole
        or len(name.encode()) > MOST_BYTES
    )


def made_safe(name: str, whole: str | None = None, digits: int = DIGITS) -> str:
    """A safe name that tells what it was made from.

    Parameters
    ----------
    name : str
        What it is to look like.
    whole : str, optional
        What it stands for: of two that differ the names differ. Default ``name``.
    digits : int
        Hexadecimal digits of the digest (SHA-256) of ``whole`` behind it.
    """
    shown = UNSAFE.sub("_", name).encode()[:LEFT_BYTES].decode(errors="ignore").strip(" .") or "_"
    digest = hashlib.sha256((name if whole is None else whole).encode("utf-8", "surrogatepass")).hexdigest()
    made = f"{shown}-{digest[:digits]}"
    return made if is_safe(made) else f"_{made}"  # a device's name is one whatever follows its first dot


def distinct_names(
    texts: Iterable[str],
    shown: Callable[[str], str] = str,
    *,
    forbidden: str = "",
    reserved: Collection[str] = (),
) -> dict[str, str]:
    """Safe names, no two of them equal, also where case and the composition of characters are not told apart.

    Parameters
    ----------
    texts : iterable of str
        What is to be named. The names depend on the set of them, not on their order.
    shown : callable
        What the name of a text is to look like.
    forbidden : str
        Characters that no name may have besides.
    reserved : collection of str
        Names that are no one's, in lower case.

    Returns
    -------
    dict of str to str
        The name of each: what it is to look like wherever that is safe and no other's, else with a digest of the text.
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
    """A relative path that stays where it is put.

    Parameters
    ----------
    path : str
        Parts separated by ``/``.
    reserved : collection of str
        Names that nothing at the top may have, in lower case.

    Returns
    -------
    str
        The path itself where all of its parts are safe, else one that is, with a digest of it in its name.
    """
    parts = path.split("/")
    if all(map(is_safe, parts)) and parts[0].lower() not in reserved:
        return path
    *folders, name = [part for part in parts if part.strip(" .")] or ["_"]
    safe = [part if is_safe(part) and part.lower() not in reserved else made_safe(part) for part in folders]
    return "/".join([*safe, with_digest(name, path)])


def with_digest(name: str, whole: str) -> str:
    """A file's name with a digest of what it stands for before its extension."""
    stem, dot, extension = name.rpartition(".")
    if dot and stem and re.fullmatch(r"[A-Za-z0-9]{1,8}", extension):
        return f"{made_safe(stem, whole)}.{extension}"
    return made_safe(name, whole)
