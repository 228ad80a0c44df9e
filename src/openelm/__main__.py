"""`python -m openelm`."""

from openelm.cli import main

main()
