"""Entry points: `bros` (also `python -m bros_router`) and `text-generation-launcher`."""

from __future__ import annotations

import os
from typing import Any

import click
import structlog

from bros_router import about, logs
from bros_router.cli import Invocation, download_command, serve_command
from bros_router.config import HubConfig, LogConfig, ModelConfig
from bros_router.host import Host
from bros_router.startup_error import StartupError
from bros_shard.exit_codes import ExitCode

log = structlog.get_logger("bros_router")


def main() -> None:
    """`bros`: serve, download-weights, env."""
    group = _Commands("bros", help="Serve language models to real-time and best-effort requests at once.")
    group.add_command(serve_command(run))
    group.add_command(download_command(download))
    group.add_command(click.Command("env", callback=show_environment, help="Show what the server would run on."))
    _with_version(group)(prog_name="bros")


def launch() -> None:
    """`text-generation-launcher`: TGI's command line."""
    _with_version(serve_command(run))(prog_name="text-generation-launcher")


def run(invocation: Invocation) -> int:
    """Serve until told to end. Returns the exit status."""
    config = invocation.config
    logs.configure(config.log)
    if invocation.shows_environment:
        log.info("environment\n" + about.describe(Host.read(os.environ)))
    for warning in invocation.warnings:
        log.warning(warning)
    return _exit_status(_serve, invocation)


def download(model: ModelConfig, hub: HubConfig) -> int:
    """Fetch a model and print where it is. Returns the exit status."""
    logs.configure(LogConfig())
    return _exit_status(_download, model, hub)


def show_environment() -> None:
    """Print what the server would run on."""
    click.echo(about.describe(Host.read(os.environ)))


def _serve(invocation: Invocation) -> None:
    from bros_router.listener import bind

    config = invocation.config
    # Before the imports below, which take a moment, and long before the weights, which take minutes.
    listener = bind(config.http.hostname, config.http.port)
    import uvloop

    from bros_router.server import serve

    uvloop.run(serve(config, listener))


class _Commands(click.Group):
    """The commands of `bros`. The simulator takes a moment to import, so it is loaded for who asks for it."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names, in order."""
        return sorted([*super().list_commands(context), "simulate"])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name."""
        if name != "simulate":
            return super().get_command(context, name)
        from bros_router.simulation.command import simulate_command

        return simulate_command()


def _download(model: ModelConfig, hub: HubConfig) -> None:
    from bros_router.hub import download
    from bros_router.progress import StartupProgress

    assert model.model_id is not None
    progress = StartupProgress()
    try:
        snapshot = download(
            model.model_id,
            model.revision,
            hub,
            lambda done, total: progress.update("downloading", done, total),
        )
    finally:
        progress.close()
    click.echo(snapshot.path)


def _exit_status(work: Any, *arguments: Any) -> int:
    """Run it, and turn what it raises into a line of log and an exit status."""
    try:
        work(*arguments)
    except StartupError as error:
        log.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.OK
    except Exception:
        log.exception("internal error")
        return ExitCode.INTERNAL
    return ExitCode.OK


def _with_version(command: click.Command) -> click.Command:
    return click.version_option(about.server_version(), "-V", "--version")(command)


if __name__ == "__main__":
    main()
