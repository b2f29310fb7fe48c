"""`palimpsest keys`: makes CURVE key pairs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--client", metavar="NAME", help="Make keys for another client of the server in FOLDER.")
def keys(folder: Path, client: str | None) -> None:
    """Write a server key pair, a client key pair and the list of authorized clients into FOLDER.

    Set network.keys = "FOLDER" in the run's config. Another node needs only client.key_secret and server.key.
    --client makes separate keys for one node, in FOLDER/clients/NAME; delete FOLDER/authorized/NAME.key to refuse its
    future connections. Running servers reload FOLDER/authorized when it changes.
    """
    from learner.launch.command_line import command_line
    from protocol.transport import create_client, create_keys

    if client is not None:
        made = create_client(folder, client)
        click.echo(
            f"keys: wrote {made} and {folder}/authorized/{client}.key, which authorizes this client\n"
            f"on that node: copy {made} there and start its roles with --set network.keys=DIR"
        )
        return
    create_keys(folder)
    click.echo(
        f"keys: wrote {folder}/server.key(_secret), {folder}/client.key(_secret) and {folder}/authorized/client.key\n"
        f'in the run\'s config:  [network]  keys = "{folder}"\n'
        f"for another node:     copy {folder}/client.key_secret and {folder}/server.key there, or make separate keys: "
        f"{command_line('palimpsest', 'keys', folder, '--client', 'NAME')}"
    )
