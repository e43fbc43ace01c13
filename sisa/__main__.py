"""``python -m sisa``: the same as the ``sisa`` command."""

from sisa.cli.main import main

if __name__ == "__main__":
    main()
