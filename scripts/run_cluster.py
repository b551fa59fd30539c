"""`reducer run` on the cluster of a YAML file: takes the same arguments, --cluster being cluster.yaml by default.

Example: python scripts/run_cluster.py photos/train --manifest photos/train.csv --output run
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout whose environment has only the dependencies

if __name__ == "__main__":
    from reducer.cli.main import run

    run.main(prog_name="run_cluster.py", default_map={"cluster": str(ROOT / "cluster.yaml")})
