"""``python -m erde``, and the console script: what takes time to import can be interrupted without a traceback."""

import os


def main() -> None:
    """Run the command line."""
    try:
        from erde.cli.main import main as command_line
    except KeyboardInterrupt:
        os.write(2, b"stopped\n")
        # Not sys.exit: what is half imported may say more than this.
        os._exit(130)
    command_line()


if __name__ == "__main__":
    main()
