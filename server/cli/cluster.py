"""The commands `cluster`: several replicas behind one address, on Ray Serve."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from reft_runtime.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Run several replicas behind one address, on Ray Serve."
)

Config = Annotated[Path, typer.Argument(help="The cluster's configuration, a YAML file.")]


@app.callback()
def _cluster() -> None:
    pass


@app.command()
def up(config: Config) -> None:
    """Run a cluster until a signal.

    SIGHUP reads the file again, and updates the cluster.
    """
    if find_spec("ray") is None:
        raise ConfigError("A cluster needs Ray Serve: pip install 'reft-server[cluster]'.")
    from server.cluster.config import read_config
    from server.cluster.up import run
    from server.logs import configure_logging
    from server.variables import tell_unknown_variables

    configure_logging(read_config(config).settings)
    tell_unknown_variables()
    raise SystemExit(run(config))
