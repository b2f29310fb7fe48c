"""`python -m learner.launch` is the `palimpsest` command."""

from learner.launch.cli import main

main()
