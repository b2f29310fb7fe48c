"""The `palimpsest` command (cli.py), and the launcher that runs all processes of a run on one machine (supervisor.py).

chaos.py, demo.py, init.py, keys.py and up.py each define the subcommand of the same name.
"""
