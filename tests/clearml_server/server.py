"""The server as tests use it: both ports, the state behind them, and faults on demand."""

from pathlib import Path
from types import TracebackType
from typing import Self

from clearml_server.api import ApiHandler
from clearml_server.faults import Fault
from clearml_server.files import FilesHandler
from clearml_server.listeners import Listener
from clearml_server.state import State

__all__ = ["ClearMLServer"]


class ClearMLServer:
    """A ClearML server (API and files) on loopback, in threads of this process.

    It starts when it is made, so that it can be used as a context manager or stopped by hand.

    Args:
        port: The port of the API; 0 for any free one.
        files_port: The port of the file server; 0 for any free one.
    """

    access_key = "TESTACCESSKEY"
    secret_key = "test-secret-key"

    def __init__(self, port: int = 0, files_port: int = 0) -> None:
        self.state = State((self.access_key, self.secret_key))
        self._api = Listener(ApiHandler, self.state, port)
        self._files = Listener(FilesHandler, self.state, files_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def api_url(self) -> str:
        return self._api.url

    @property
    def files_url(self) -> str:
        return self._files.url

    @property
    def web_url(self) -> str:
        """The address of a web server that is not there: clients only print it."""
        return "http://127.0.0.1:9"

    def environment(self, folder: Path, settings: Path | None = None) -> dict[str, str]:
        """Return the variables that lead a process of the SDK to this server and nowhere else.

        Args:
            folder: Home of the process, where the SDK and the agent keep sessions and caches.
            settings: A configuration file; without one, there is none.
        """
        return {
            "HOME": str(folder),
            "CLEARML_API_HOST": self.api_url,
            "CLEARML_WEB_HOST": self.web_url,
            "CLEARML_FILES_HOST": self.files_url,
            "CLEARML_API_ACCESS_KEY": self.access_key,
            "CLEARML_API_SECRET_KEY": self.secret_key,
            "CLEARML_CONFIG_FILE": str(settings or folder / "clearml-absent.conf"),
            "CLEARML_CACHE_DIR": str(folder / "clearml-cache"),
        }

    @property
    def fault(self) -> Fault | None:
        """What the API does wrong now; set it at any moment, None to heal."""
        return self._api.fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._api.fault = fault

    @property
    def files_fault(self) -> Fault | None:
        """What the file server does wrong now."""
        return self._files.fault

    @files_fault.setter
    def files_fault(self, fault: Fault | None) -> None:
        self._files.fault = fault

    def heal(self) -> None:
        """End every fault."""
        self.fault = self.files_fault = None

    def forget(self) -> None:
        """Lose everything, as after a restart with an empty database."""
        self.state.forget()

    def stop(self) -> None:
        """Close both ports; requests that hang do not hold this up."""
        self._api.stop()
        self._files.stop()
