"""`python -m forkproof`: the command, where its script is not on PATH."""

from forkproof.cli import main

if __name__ == "__main__":
    main(prog_name="forkproof")
