"""Where a server listens, and who may not."""

from __future__ import annotations

import socket

import pytest

from batchinfer.errors import ConfigError, TransientError
from batchinfer.serving import Address, bind, let_go


def test_a_port_that_is_taken_is_another_start_s_to_have_later() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(TransientError, match=r"port \d+ of 127.0.0.1 is in use by another"):
            bind("127.0.0.1", Address.of(taken).port)


def test_a_port_is_taken_before_anybody_listens_there() -> None:
    """Two servers whose models load at the same time do not find out when they have loaded."""
    with bind("127.0.0.1", 0) as taken, pytest.raises(TransientError, match="in use"):
        bind("127.0.0.1", Address.of(taken).port)


def test_a_port_whose_last_connection_has_just_ended_is_free() -> None:
    """A server can be started again at once."""
    with bind("127.0.0.1", 0) as first:
        first.listen()
        let_go(listening := first.dup())
        assert listening.fileno() == -1
        port = Address.of(first).port
        client = socket.create_connection(("127.0.0.1", port))
        there, _ = first.accept()
        there.close()  # this side waits, as it closed first
        client.close()
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1", "a" * 300])
def test_an_address_of_no_interface_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="Give an address of this machine"):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "url", "is_local"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000", True),
        ("127.9.0.1", "http://127.9.0.1:8000", True),
        ("::1", "http://[::1]:8000", True),
        ("0.0.0.0", "http://127.0.0.1:8000", False),
        ("::", "http://[::1]:8000", False),
        ("192.168.1.5", "http://192.168.1.5:8000", False),
    ],
)
def test_the_url_is_one_that_this_machine_can_use(host: str, url: str, is_local: bool) -> None:
    assert (Address(host, 8000).url, Address(host, 8000).is_local) == (url, is_local)
