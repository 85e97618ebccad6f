"""`python -m asge_zoo`."""

from asge_zoo.cli.main import main

main()
