"""``python -m reducer``."""

from reducer.cli.main import main

if __name__ == "__main__":
    main(prog_name="reducer")
