"""`python -m gradrun`: the same as the `gradrun` command."""

from gradrun.cli.app import main

main()
