"""Run the `gradrun` command as `python -m gradrun`."""

from gradrun.cli.app import main

main()
