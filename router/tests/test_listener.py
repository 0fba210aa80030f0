"""The listening socket: had at once, or refused with a reason that helps."""

import socket

import pytest

from bros_router.listener import bind
from bros_router.startup_error import UsageError


def test_port_is_listened_on_from_the_start():
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=10) as client:
        assert client.getpeername() == listener.getsockname()


@pytest.mark.parametrize("does_listen", [True, False])
def test_taken_port_is_refused(does_listen):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        other.bind(("127.0.0.1", 0))
        if does_listen:
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"Port {port} is taken: choose another with --port"):
            bind("127.0.0.1", port)


def test_two_servers_do_not_share_a_port():
    with bind("127.0.0.1", 0) as first, pytest.raises(UsageError, match="is taken"):
        bind("127.0.0.1", first.getsockname()[1])


def test_port_of_a_server_that_just_ended_is_free():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            accepted, _ = first.accept()
            accepted.close()  # closed first by the server: its end stays in TIME_WAIT
    with bind("127.0.0.1", port) as second:
        assert second.getsockname()[1] == port


def test_address_of_another_machine_is_refused():
    with pytest.raises(UsageError, match=r"192\.0\.2\.1 is not an address of this machine"):
        bind("192.0.2.1", 0)


def test_six_is_as_good_as_four():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with bind("::1", 0) as listener:
        assert listener.family is socket.AF_INET6
