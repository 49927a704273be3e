"""`python -m gradrun`: the same as the `gradrun` command."""

from gradrun.cli import main

main()
