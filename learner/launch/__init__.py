"""The `palimpsest` command (cli.py) and what runs a whole run on one machine.

chaos.py, demo.py, keys.py and up.py each hold the subcommand of the same name.
"""
