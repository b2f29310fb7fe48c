"""`palimpsest keys`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def keys(folder: Path) -> None:
    """Write a server pair, a client pair and an allow-list into FOLDER.

    Set network.keys = "FOLDER" in the run's config. A node that joins needs client.key_secret and server.key only. To
    admit another client, put its public .key file into FOLDER/authorized and start the run again.
    """
    from protocol.transport import create_keys

    create_keys(folder)
    click.echo(
        f"keys: wrote {folder}/server.key(_secret), {folder}/client.key(_secret) and {folder}/authorized/client.key\n"
        f'in the run\'s config:  [network]  keys = "{folder}"\n'
        f"for another node:     copy {folder}/client.key_secret and {folder}/server.key there"
    )
