"""Entry point of one rank: `bros-shard`, or `python -m bros_shard`."""

from __future__ import annotations

import sys

from bros_shard.lifeline import die_with_parent
from bros_shard.options import ShardOptions


def main() -> None:
    """Run one rank until the router says `Shutdown`."""
    options = ShardOptions.from_argv(sys.argv[1:])
    die_with_parent()
    # torch and transformers take seconds to import: a wrong flag should not have to wait for them.
    from bros_shard.server import ShardServer

    sys.exit(ShardServer(options).run())


if __name__ == "__main__":
    main()
