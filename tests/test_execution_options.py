"""Where chains run, as it was asked for: an address at which nobody is, is noticed before any work is done."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest
import ray

from sisa.errors import UserError
from sisa.execution import cluster, driver
from sisa.execution.options import Execution


@pytest.fixture
def free_port():
    """A port of this machine at which nobody listens."""
    with contextlib.closing(socket.socket()) as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def listening():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}"])
def test_a_cluster_that_is_dead_is_refused_at_once(free_port, form):
    address = form.format(free_port)
    began = time.monotonic()
    with pytest.raises(UserError, match="nobody answers at") as caught:
        Execution(address=address).check()
    assert time.monotonic() - began < 5
    assert f"--address {address!r}" in caught.value.message
    assert f"port {free_port}" in caught.value.message


def test_where_somebody_listens_nothing_is_said(listening):
    Execution(address=f"127.0.0.1:{listening}").check()


def test_ray_client_is_refused_here_and_where_chains_run(listening):
    address = f"ray://127.0.0.1:{listening}"
    message = "Ray Client is not supported yet; expected host:port or auto"
    with pytest.raises(UserError, match=message):
        Execution(address=address).check()
    with pytest.raises(UserError, match=message), cluster.connected(address, cores=1):
        pass


class Failing:
    """Ray, whose workers can't read what they are told."""

    exceptions = ray.exceptions

    def get(self, _):
        said = "System error: No module named 'sisa'\ntraceback: ...\n\nModuleNotFoundError: No module named 'sisa'\n"
        raise ray.exceptions.RaySystemError(said)


def test_workers_that_have_not_this_package_are_the_callers_mistake():
    with pytest.raises(UserError, match=r"can't take up its chain: ModuleNotFoundError: No module named 'sisa'$"):
        driver.taken(Failing(), iter([None]))


@pytest.mark.parametrize(
    "address", ["nonsense", "host", "host:", ":6379", "host:port", "host:99999", "", "[::1:6379", "local"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="expected host:port or auto"):
        Execution(address=address).check()


def test_a_name_that_nobody_has_is_refused():
    with pytest.raises(UserError, match=r"nobody answers at no-such-host\.invalid"):
        Execution(address="no-such-host.invalid:6379").check()


def test_auto_is_the_cluster_that_ray_finds(free_port, listening, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening}")
    Execution(address="auto").check()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    with pytest.raises(UserError, match=r"--address 'auto': nobody answers at 127\.0\.0\.1"):
        Execution(address="auto").check()


def test_auto_without_a_cluster_is_refused(monkeypatch):
    def nobody(*_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.get_ray_address_from_environment", nobody)
    with pytest.raises(UserError, match="no Ray cluster runs on this machine"):
        Execution(address="auto").check()


@pytest.mark.parametrize(
    "execution",
    [
        Execution(),
        Execution(executor="ray"),
        Execution(executor="inline", address="nowhere"),
    ],
    ids=str,
)
def test_where_no_address_is_used_nothing_is_checked(execution, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it was"))
    monkeypatch.setattr(cluster, "running_cluster", lambda: pytest.fail("it was"))
    execution.check()
