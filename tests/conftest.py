"""Fixtures that all tests share. Nothing here downloads: `make sysroots` does, and what is not there is skipped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from fixtures.build import Result
from tests.support.machines import built, can_build
from tools.sysroot import find

settings.register_profile("forkproof", deadline=None)  # no test asserts a time
settings.load_profile("forkproof")

if threading.current_thread() is threading.main_thread():
    # nohup and shells' background jobs ignore these, and so would the programs that tests interrupt: only what is
    # handled becomes the default again when a program begins (execve(2)).
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def _sysroot(name: str) -> Path:
    root = find(name)
    if root is None:
        pytest.skip(f"no sysroot {name}: make sysroots SYSROOTS={name}")
    return root


@pytest.fixture(scope="session")
def sysroot() -> Callable[[str], Path]:
    """The root of a sysroot by its name in tools/sysroots.toml; skips the test if it has not been made."""
    return _sysroot


@pytest.fixture(scope="session")
def sysroot_amd64() -> Path:
    return _sysroot("bookworm-amd64")


@pytest.fixture(scope="session")
def sysroot_arm64() -> Path:
    return _sysroot("bookworm-arm64")


def _built(machine: str) -> Result:
    if not can_build(machine):
        pytest.skip(f"no compiler for {machine}")
    return built(machine)


@pytest.fixture(scope="session")
def built_fixtures() -> Callable[[str], Result]:
    """All fixtures of one machine, built; skips the test if there is no compiler for it."""
    return _built


@pytest.fixture(scope="session")
def built_x86_64() -> Result:
    return _built("x86_64")


@pytest.fixture(scope="session")
def built_aarch64() -> Result:
    return _built("aarch64")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are marked `together` go to one worker, with those of their module that have the same parameters.

    First, since xdist reads the groups in its own hook of this name. It writes them where pytest 9 does not read them,
    hence the limit in pyproject.toml.
    """
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for mark in item.iter_markers("together"):
            shared = [str(parameters[name]) for name in mark.args if name in parameters]
            item.add_marker(pytest.mark.xdist_group(" ".join([item.path.stem, *shared])))
