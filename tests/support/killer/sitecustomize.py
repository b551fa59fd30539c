"""A picture format that ends or hangs the process which opens it, as a broken decoder does.

Python runs this module at its start wherever this folder is on PYTHONPATH. A file of the format is ``KILLER`` and what
is to happen: ``exit``, ``signal`` or ``hang``; each opening is noted in the file that KILLER_LOG names.
"""

from __future__ import annotations

import os
import signal
import time

from PIL import Image

MAGIC = b"KILLER "


def accept(prefix: bytes) -> bool:
    if not prefix.startswith(MAGIC):
        return False
    how = prefix[len(MAGIC) :].split()[0].decode()
    if log := os.environ.get("KILLER_LOG"):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {how}\n")
    if how == "exit":
        os._exit(7)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)
    return False


# Under the name of a format of photos that Pillow does not know without a plugin.
Image.register_open("JXL", lambda *_: None, accept)  # type: ignore[arg-type,return-value]
