"""The commands `key new` and `key check`: keys for tenants, and the file that lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_runtime.errors import ConfigError
from server.tenants.keys import new_key
from server.tenants.keys_file import TENANT_RULE, is_tenant_name, read_keys_file

PLACEHOLDER = "NAME"
"""Stands for the tenant's name where none is given; whoever edits the file writes one there."""

app = typer.Typer(no_args_is_help=True, help="Make keys for tenants, and check the keys file.")


@app.command()
def new(
    tenant: Annotated[str, typer.Option(help=f"Name of the tenant: {TENANT_RULE}.")] = PLACEHOLDER,
    upload: Annotated[
        bool,
        typer.Option("--upload", help="Let it upload, replace and remove what is called TENANT.*"),
    ] = False,
    admin: Annotated[
        bool,
        typer.Option("--admin", help="Let it see and change everything, /metrics and usage too"),
    ] = False,
) -> None:
    """Make a key, and print it with its lines for the keys file.

    It is shown this once: the file has only its hash.
    """
    if tenant != PLACEHOLDER and not is_tenant_name(tenant):
        raise ConfigError(f"--tenant: give {TENANT_RULE}.", param="tenant")
    if admin and upload:
        raise ConfigError("--upload: leave it out; an admin may change everything.", param="upload")
    key, hashed = new_key()
    typer.echo(f"Key, for whoever is to use it; it is shown this once: {key}")
    typer.echo("For the keys file (a second key of a tenant is a second hash in its list):")
    typer.echo(f'\n[tenants.{tenant}]\nkeys = ["{hashed}"]')
    if admin:
        typer.echo('role = "admin"  # it sees and changes everything')
        return
    typer.echo(
        f'interventions = ["{tenant}.*"]  # the names that it sees; "*" is all\n'
        f"upload = {str(upload).lower()}  # whether it may upload, replace and remove {tenant}.*"
    )


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The keys file.")]) -> None:
    """Say whether a keys file is usable, and which tenants it has."""
    keys = read_keys_file(file)
    names = dict.fromkeys(tenant.name for tenant in keys.values())
    typer.echo(f"{file}: {len(keys)} key{'s' * (len(keys) > 1)} of {', '.join(names)}")
