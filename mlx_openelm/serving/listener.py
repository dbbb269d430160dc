"""The socket of the server, bound before the model is loaded."""

import errno
import ipaddress
import socket

from mlx_openelm.errors import OpenELMError
from mlx_openelm.serving.access import Access


class Listener:
    """A bound socket, on which requests are accepted later.

    Attributes:
        is_loopback: whether only programs of this machine can reach it.
    """

    def __init__(self, access: Access) -> None:
        """Bind the port.

        Raises:
            OpenELMError: the port is in use, the host does not exist, or other machines
                could reach it without a key.
        """
        self.access = access
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                access.host,
                access.port,
                type=socket.SOCK_STREAM,
                flags=socket.AI_PASSIVE,
            )[0]
        except (OSError, UnicodeError) as error:
            raise OpenELMError(
                f"There is no host {access.host!r} to listen on ({error}); choose "
                "another with `host`."
            ) from error
        self.is_loopback = ipaddress.ip_address(str(address[0])).is_loopback
        if not self.is_loopback and not access.api_key:
            raise OpenELMError(
                f"Other machines could use the model at {access.host}; set a key with "
                "`api_key`, or listen on 127.0.0.1."
            )
        self.socket = socket.socket(family, kind, protocol)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(address)
        except OSError as error:
            self.socket.close()
            where = f"port {access.port} of {access.host}"
            if error.errno == errno.EADDRINUSE:
                raise OpenELMError(
                    f"Another program listens on {where}; choose another with `port`."
                ) from error
            raise OpenELMError(
                f"Cannot listen on {where} ({error.strerror}); choose another with "
                "`port` or `host`."
            ) from error

    @property
    def url(self) -> str:
        host = f"[{self.access.host}]" if ":" in self.access.host else self.access.host
        return f"http://{host}:{self.socket.getsockname()[1]}"

    def close(self) -> None:
        self.socket.close()
