"""`palimpsest keys`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--client", metavar="NAME", help="Make keys for one more client of FOLDER's server.")
def keys(folder: Path, client: str | None) -> None:
    """Write a server pair, a client pair and an allow-list into FOLDER.

    Set network.keys = "FOLDER" in the run's config. A node that joins needs client.key_secret and server.key only.
    With --client, a node gets keys of its own, in FOLDER/clients/NAME: delete FOLDER/authorized/NAME.key, and it
    cannot connect again. The servers of a run that goes on read FOLDER/authorized anew when it changes.
    """
    from protocol.transport import create_client, create_keys

    if client is not None:
        made = create_client(folder, client)
        click.echo(
            f"keys: wrote {made}, and {folder}/authorized/{client}.key lets it in\n"
            f"for that node: copy {made} there and give it with --set network.keys=DIR"
        )
        return
    create_keys(folder)
    click.echo(
        f"keys: wrote {folder}/server.key(_secret), {folder}/client.key(_secret) and {folder}/authorized/client.key\n"
        f'in the run\'s config:  [network]  keys = "{folder}"\n'
        f"for another node:     copy {folder}/client.key_secret and {folder}/server.key there, or give it keys of its "
        f"own: palimpsest keys {folder} --client NAME"
    )
