"""`python -m effuse` is the command `effuse`."""

from effuse.cli import main

if __name__ == "__main__":
    main()
