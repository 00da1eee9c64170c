"""The fault proxy by itself, between real sockets: each fault does to a connection what it says, and no more."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.faults.proxy import COMMIT, Fault, Kind, Proxy, Toward

SAID = bytes(range(256)) * 4
#: Patience with what comes, and with what must not come.
SOON_S, NEVER_S = 5.0, 0.15


class Echo(socketserver.BaseRequestHandler):
    """Says everything again, and at the end of the stream how it ended."""

    def handle(self) -> None:
        heard = b""
        try:
            while said := self.request.recv(65536):
                heard += said
                self.request.sendall(said)
            self.server.heard.append((heard, "end"))
            self.request.sendall(b"END")
        except ConnectionResetError:
            self.server.heard.append((heard, "reset"))
        except BrokenPipeError:
            self.server.heard.append((heard, "gone"))


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.heard: list[tuple[bytes, str]] = []


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(echo: EchoServer) -> Iterator[Proxy]:
    with Proxy(echo.server_address[1]) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=SOON_S)


def hear(client: socket.socket, size: int, patience_s: float = SOON_S) -> tuple[bytes, str]:
    """Up to `size` bytes, and why there are no more: enough, end, reset or silence."""
    heard = b""
    client.settimeout(patience_s)
    try:
        while len(heard) < size:
            if not (said := client.recv(size - len(heard))):
                return heard, "end"
            heard += said
    except ConnectionResetError:
        return heard, "reset"
    except TimeoutError:
        return heard, "silence"
    return heard, "enough"


def heard_by(echo: EchoServer) -> tuple[bytes, str]:
    """What the server heard in its first connection that ended, and how."""
    deadline = time.monotonic() + SOON_S
    while not echo.heard and time.monotonic() < deadline:
        time.sleep(0.005)
    return echo.heard[0]


def test_without_a_fault_everything_passes_and_the_end_too(echo: EchoServer, proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID)) == (SAID, "enough")
        client.shutdown(socket.SHUT_WR)
        assert hear(client, 99) == (b"END", "end")
    assert heard_by(echo) == (SAID, "end")


@pytest.mark.parametrize("toward", Toward)
@pytest.mark.parametrize("kind", [Kind.LATENCY, Kind.TRICKLE, Kind.SLICES])
def test_what_is_late_or_in_pieces_arrives_whole(kind: Kind, toward: Toward, proxy: Proxy) -> None:
    fault = Fault(kind, toward, seconds=0.001, size=100)
    proxy.play(fault)
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID)) == (SAID, "enough")
    assert proxy.struck[fault] > 0


def test_a_latency_holds_a_chunk_back(proxy: Proxy) -> None:
    proxy.play(Fault(Kind.LATENCY, Toward.CLIENT, seconds=30))
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID), NEVER_S) == (b"", "silence")


def test_slices_are_pieces(proxy: Proxy) -> None:
    proxy.play(Fault(Kind.TRICKLE, Toward.CLIENT, seconds=0.5, size=100))
    with connect(proxy) as client:
        client.sendall(SAID)
        assert 0 < len(client.recv(65536)) < len(SAID)


@pytest.mark.parametrize("after", [0, 5, 700])
@pytest.mark.parametrize(("kind", "ending"), [(Kind.CUT, "end"), (Kind.RESET, "reset")])
def test_a_cut_and_a_reset_let_n_bytes_pass_toward_the_server(
    kind: Kind, ending: str, after: int, echo: EchoServer, proxy: Proxy
) -> None:
    proxy.play(Fault(kind, Toward.SERVER, after=after))
    with connect(proxy) as client:
        client.sendall(SAID)
        said, how = hear(client, len(SAID))
        assert how in (ending, "reset")
    heard, how = heard_by(echo)
    assert how == ending or kind is Kind.CUT  # its echo may find the connection closed, and so reset
    # A reset throws away what its receiver had not read yet.
    assert SAID[:after] == heard if kind is Kind.CUT else SAID[:after].startswith(heard)
    assert SAID[:after].startswith(said)


@pytest.mark.parametrize("after", [0, 5, 700])
def test_a_cut_lets_n_bytes_pass_toward_the_client(after: int, proxy: Proxy) -> None:
    proxy.play(Fault(Kind.CUT, Toward.CLIENT, after=after))
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID)) == (SAID[:after], "end")


def test_a_cut_counts_its_bytes_over_the_chunks_that_follow(proxy: Proxy) -> None:
    proxy.play(Fault(Kind.CUT, Toward.CLIENT, after=15))
    with connect(proxy) as client:
        client.sendall(SAID[:10])
        assert hear(client, 10) == (SAID[:10], "enough")
        client.sendall(SAID[10:20])
        assert hear(client, 10) == (SAID[10:15], "end")


def test_a_reset_toward_the_client_is_a_reset(echo: EchoServer, proxy: Proxy) -> None:
    proxy.play(Fault(Kind.RESET, Toward.CLIENT))
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID)) == (b"", "reset")
    assert heard_by(echo) == (SAID, "reset")


def test_a_half_close_toward_the_client_leaves_the_other_direction_open(echo: EchoServer, proxy: Proxy) -> None:
    proxy.play(Fault(Kind.HALF_CLOSE, Toward.CLIENT, after=5))
    with connect(proxy) as client:
        client.sendall(SAID[:100])
        assert hear(client, 100) == (SAID[:5], "end")
        client.sendall(SAID[100:])
        client.shutdown(socket.SHUT_WR)
        assert heard_by(echo) == (SAID, "end")


def test_a_half_close_toward_the_server_leaves_the_answer_whole(echo: EchoServer, proxy: Proxy) -> None:
    proxy.play(Fault(Kind.HALF_CLOSE, Toward.SERVER, after=5))
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, 99) == (SAID[:5] + b"END", "end")
    assert heard_by(echo) == (SAID[:5], "end")


@pytest.mark.parametrize(("toward", "answer"), [(Toward.SERVER, SAID[:5]), (Toward.CLIENT, SAID[:5])])
def test_a_black_hole_swallows_and_tells_nobody_until_it_ends_in_a_reset(
    toward: Toward, answer: bytes, proxy: Proxy
) -> None:
    proxy.play(Fault(Kind.BLACK_HOLE, toward, after=5, seconds=10 * NEVER_S))
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID), NEVER_S) == (answer, "silence")
        client.sendall(SAID)
        assert hear(client, len(SAID), SOON_S) == (b"", "reset")


def test_a_lost_answer_was_asked_for_and_does_not_come(echo: EchoServer, proxy: Proxy) -> None:
    fault = Fault(Kind.LOST_ANSWER, Toward.SERVER, holding=COMMIT, nth=2)
    proxy.play(fault)
    with connect(proxy) as client:
        for said in (COMMIT, b"Q..BEGIN"):
            client.sendall(said)
            assert hear(client, len(said)) == (said, "enough")
        client.sendall(COMMIT)
        assert hear(client, len(COMMIT)) == (b"", "reset")
    assert heard_by(echo) == (COMMIT + b"Q..BEGIN" + COMMIT, "reset")
    assert (proxy.met[fault], proxy.struck[fault]) == (2, 1)


def test_faults_are_switched_while_a_connection_is_open(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID)) == (SAID, "enough")
        proxy.play(Fault(Kind.CUT, Toward.SERVER))
        client.sendall(SAID)
        assert hear(client, 1) == (b"", "end")
    proxy.play()
    with connect(proxy) as client:
        client.sendall(SAID)
        assert hear(client, len(SAID)) == (SAID, "enough")


def fates(echo: EchoServer, seed: int) -> list[str]:
    with Proxy(echo.server_address[1], seed=seed) as proxy:
        proxy.play(Fault(Kind.CUT, Toward.SERVER, share=0.5))
        found = []
        for _ in range(30):
            with connect(proxy) as client:
                client.sendall(b"x")
                found.append(hear(client, 1)[1])
        return found


def test_a_share_is_drawn_and_a_seed_draws_it_again(echo: EchoServer) -> None:
    once = fates(echo, 1)
    assert 5 < once.count("end") < 25
    assert fates(echo, 1) == once
    assert fates(echo, 2) != once


def test_a_server_that_is_not_there_is_a_reset() -> None:
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Proxy(nobody.getsockname()[1]) as proxy:
            try:
                with connect(proxy) as client:
                    fate = hear(client, 1)
            except ConnectionResetError:  # before the caller knew that it was connected
                fate = (b"", "reset")
            assert fate == (b"", "reset")
