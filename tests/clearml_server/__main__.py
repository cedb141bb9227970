"""Run the server by hand: `python -m clearml_server --port 8008 --files-port 8081`."""

import argparse
import contextlib
import tempfile
import threading
from pathlib import Path

from clearml_server import ClearMLServer


def main() -> None:
    """Serve until Ctrl-C, after printing the variables that lead a client here."""
    parser = argparse.ArgumentParser(prog="clearml_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8008, help="of the API (default: %(default)s)")
    parser.add_argument("--files-port", type=int, default=8081, help="default: %(default)s")
    options = parser.parse_args()
    with (
        ClearMLServer(options.port, options.files_port) as server,
        contextlib.suppress(KeyboardInterrupt),
    ):
        variables = server.environment(Path(tempfile.gettempdir()) / "clearml_server")
        del variables["HOME"]
        for name, value in variables.items():
            print(f"export {name}={value}")
        print("# Serving until Ctrl-C.", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
