"""Whether a `vggrow ...` line that stands in a file is one that vggrow takes, without running it."""

import click

from deploy.cli import vggrow


def parse(words: list[str]) -> None:
    """click's own UsageError for a command or an option that is not there; files that are named need not be."""
    assert words[0] == "vggrow"
    command: click.Command = vggrow
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.commands.get(rest[0])
        if found is None:
            raise click.UsageError(f"no such command: {' '.join(words)}")
        command, rest = found, rest[1:]
    kinds = {param.name: param.type for param in command.params}
    for param in command.params:
        if isinstance(param.type, click.Path):
            param.type = click.STRING
    try:
        command.make_context(command.name or "", list(rest))
    finally:
        for param in command.params:
            param.type = kinds[param.name]
