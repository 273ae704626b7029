"""A bug that one program brings to light costs the others nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

import forkproof
from forkproof import pipeline
from forkproof.errors import UsageError
from forkproof.facts import Facts
from forkproof.model import Finding
from forkproof.options import QUIET, ScanOptions


def _stumbles(facts: Facts) -> list[Finding]:
    if facts.target.endswith("false"):
        raise KeyError("surprise")
    return []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "RULES", (_stumbles,))


@pytest.mark.usefixtures("machine")
def test_a_bug_is_told_of_the_program_that_met_it() -> None:
    report = forkproof.scan("/bin/false", "/bin/true", cache=None)
    assert [Path(target.path).name for target in report.targets] == ["true"]
    (message,) = report.errors
    assert message.startswith("/bin/false: internal error: KeyError: 'surprise'")
    assert "scan this program alone" in message


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("targets", "is_last", "collects"),
    [(["/bin/true"], False, True), (["/bin/true"], True, False), (["/bin/true", "/bin/echo"], True, True)],
    ids=["one of many scans", "the last of a process", "several programs"],
)
def test_garbage_is_left_only_where_the_process_ends(targets: list[str], is_last: bool, collects: bool) -> None:
    assert gc.isenabled()
    try:
        pipeline.scan(targets, ScanOptions(), QUIET, is_last=is_last)
        assert gc.isenabled() is collects
    finally:
        gc.enable()


@pytest.mark.usefixtures("machine")
def test_alone_it_is_raised() -> None:
    with pytest.raises(KeyError):
        forkproof.scan("/bin/false", cache=None)


@pytest.mark.usefixtures("machine")
def test_a_preload_in_vain_is_an_error_of_the_report() -> None:
    """Who looks at findings and errors must not take the answer to another question for a clean one."""
    report = forkproof.scan("/bin/false", "/bin/true", preload=["libnope.so", "/nope/libx.so"])
    name, path = (message for message in report.errors if "cannot be preloaded" in message)
    assert name.startswith("/bin/true: libnope.so: cannot be preloaded")
    assert "no such file in any search directory" in name
    assert "no such file in the sysroot" in path


@pytest.mark.usefixtures("machine")
def test_programs_share_one_message_of_what_they_were_scanned_without() -> None:
    report = forkproof.scan("/bin/true", "/bin/echo", preload=["libnope.so"])
    (message,) = report.errors
    assert message.startswith("/bin/true and 1 more: libnope.so: cannot be preloaded")


def test_nothing_to_scan_is_not_clean() -> None:
    with pytest.raises(UsageError):
        forkproof.scan()


def test_an_empty_name_is_a_mistake() -> None:
    """A script's variable that is not set."""
    with pytest.raises(UsageError, match="empty"):
        forkproof.scan("/bin/true", "")


def test_a_tar_without_files_is_a_tar(tmp_path: Path) -> None:
    empty = tmp_path / "x.tar"
    empty.write_bytes(bytes(10240))
    (message,) = forkproof.scan(empty).errors
    assert "holds no ELF program" in message


@pytest.mark.parametrize("option", ["preload", "also", "library_path"])
def test_one_text_is_no_list(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        forkproof.scan("/bin/true", **{option: "libx.so"})
