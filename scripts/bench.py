"""Measure what the README claims, side by side; prints Markdown tables. Nothing here is asserted.

What is timed is run once to warm up, then at least five times in turn with what it is compared to; told are the median
and the range. ``--json FILE``, behind the command, writes all of it.

Examples:
    python scripts/bench.py speed                  # whole job against the notebook and, if installed, others
    python scripts/bench.py speed --folder PHOTOS  # the same of real photos, a folder a label
    python scripts/bench.py floor                  # whole job against bare processes that only decode and hash
    python scripts/bench.py startup                # commands that have little to do
    python scripts/bench.py memory                 # peak worker memory; partitions small and large, large photos
    python scripts/bench.py codec PHOTOS           # where the time of one photo goes; a folder a label
    python scripts/bench.py fidelity PHOTOS        # bits by which the fast ways to decode differ from exact; likewise
    python scripts/bench.py flat PHOTOS            # hashes of photos without contrast; likewise
    python scripts/bench.py quality PHOTOS         # what each strategy keeps, against random; likewise
    python scripts/bench.py ranking                # time and memory of each strategy for one large label
    python scripts/bench.py mixture                # what each strategy keeps of vectors of which all is known
    python scripts/bench.py vectors                # ranking a million vectors; needs 5 GB of disk
    python scripts/bench.py embed                  # --embed against bare onnxruntime; needs the extra "test"
    python scripts/bench.py plan                   # checking and planning a manifest of GLDv2's size
    python scripts/bench.py scale SIZES            # whole runs without photos, once and ten times as large; SIZES:
                                                   # a TSV file with the columns images_in_class and n_classes
    python scripts/bench.py scaling SIZES          # 1 to 256 workers, simulated from the times of a real run
    python scripts/bench.py s3                     # photos on S3 against a local folder; needs the extra "test"
    python scripts/bench.py tar                    # the same photos as single files and in tar shards; likewise
    python scripts/bench.py shards                 # peak memory of one worker that reads 8 GB of tar; likewise
    python scripts/bench.py export                 # exporting photos, against cp -r and a server's own copy; likewise
    python scripts/bench.py cut SIZES              # cutting a large ranked run, comparing its labels
    python scripts/bench.py report SIZES           # the report of such a run
    python scripts/bench.py all PHOTOS SIZES       # all of these, with what they measure by default (hours)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.codec import codec, fidelity, flat
from benchmarks.common import REPETITIONS, say, write_json
from benchmarks.planning import plan, scale
from benchmarks.runs import cut, report
from benchmarks.scaling import SECONDS, scaling
from benchmarks.selection import quality, ranking
from benchmarks.speed import floor, memory, speed, startup
from benchmarks.storage import export, s3, shards, tar
from benchmarks.vectors import STRATEGIES_BY_VECTORS, embed, mixture, vectors

from reducer.config.settings import DECODE_NAMES

COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        *(speed, floor, startup, memory, codec, fidelity, flat, quality, ranking),
        *(mixture, vectors, embed, plan, scale, scaling),
        *(s3, tar, shards, export, cut, report),
    )
}
#: Of how many photos, where that can be said.
PHOTOS = {
    "speed": 3_000,
    "floor": 30_000,
    "memory": 30_000,
    "vectors": 1_000_000,
    "embed": 12_000,
    "plan": 1_580_470,
    "scaling": 30_000,
    "s3": 3_000,
    "tar": 3_000,
    "export": 6_000,
}
OF_A_FOLDER = ("codec", "fidelity", "flat", "quality")
OF_SIZES = ("scale", "scaling", "cut", "report")
#: Measured once: their figures are no times, or there is no room for more.
ONCE = ("memory", "flat", "quality", "shards", "scaling")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    adders = {}
    for name, function in COMMANDS.items():
        adders[name] = commands.add_parser(name, help=function.__doc__.partition("\n")[0]).add_argument
    adders["all"] = commands.add_parser("all", help="All of them.").add_argument
    for name, add in adders.items():
        if name in (*OF_A_FOLDER, "all"):
            add("photos", help="photos, in a folder a label")
        if name in (*OF_SIZES, "all"):
            add("sizes", help="TSV file: images_in_class, and n_classes for how many labels have so many")
        if name in PHOTOS:
            add("--photos", type=int, default=PHOTOS[name])
        if name not in (*ONCE, "all"):
            add("--repetitions", type=int, default=REPETITIONS, help="rounds that count")
        add("--json", type=Path, metavar="FILE", help="write all that is told here too")
    adders["speed"]("--folder", dest="folder_of_photos", metavar="DIR", help="these photos, in a folder a label")
    adders["speed"](
        "--without", nargs="*", default=[], metavar="NAME", help="leave out what has this in its name (notebook, exact)"
    )
    adders["floor"]("--decode", nargs="+", default=["fast", "exact"], choices=DECODE_NAMES)
    adders["ranking"]("candidates", type=int, nargs="*", default=[1_000, 6_272, 20_000])
    adders["vectors"]("--dimensions", type=int, default=512)
    adders["vectors"]("--labels", type=int, default=16_000)
    adders["vectors"]("--strategies", nargs="+", default=["facility-location"], choices=STRATEGIES_BY_VECTORS)
    adders["embed"]("--model", metavar="FILE", help="an ONNX model; default one like MobileNetV2 with random weights")
    adders["scale"]("--times", type=int, nargs="*", default=[1, 10], help="how often each label is there")
    adders["scale"]("--plan-times", type=int, default=64, help="the same of a manifest that is only planned")
    adders["scaling"]("--most", type=int, default=256, metavar="WORKERS", help="from 1, always twice as many")
    adders["scaling"]("--seconds", type=float, default=SECONDS, help="a replay lasts about so long at most")
    adders["shards"]("--gigabytes", type=float, default=8.0, help="10^9 bytes, in shards of one")
    adders["cut"]("--keep-in", metavar="DIR", help="leave the generated run here (default: a temporary directory)")
    return top


def main() -> None:
    """Run a command."""
    options = vars(parser().parse_args())
    command, target = options.pop("command"), options.pop("json")
    if command != "all":
        COMMANDS[command](**options)
    else:
        for name in COMMANDS:
            given = [options["photos"]] * (name in OF_A_FOLDER) + [options["sizes"]] * (name in OF_SIZES)
            own = vars(parser().parse_args([name, *given]))
            say(f"## {name}")
            COMMANDS[name](**{key: value for key, value in own.items() if key not in ("command", "json")})
    if target is not None:
        write_json(target, command, options)


if __name__ == "__main__":
    main()
