"""`python -m dsno_kernels info | demo`."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; its own options follow its name."""
    parser = argparse.ArgumentParser(
        prog="python -m dsno_kernels", description=sys.modules["dsno_kernels"].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backend would run each op")
    commands.add_parser(
        "demo", help="train a small DSNO on real images and compare the layers", add_help=False
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from dsno_kernels import demo

        return demo.main(rest)
    if rest:
        parser.error(f"info takes no arguments, got {' '.join(rest)}")
    from dsno_kernels import info

    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
