"""Files that appear complete or not at all."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dsno_kernels._files import replacing, write_json
from tests.faults import full_disk


@pytest.fixture(params=[None, b"earlier"], ids=["new", "replaced"])
def earlier(request: pytest.FixtureRequest, path: Path) -> bytes | None:
    """What the file holds before; None: there is none."""
    if request.param is not None:
        path.write_bytes(request.param)
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.json"


def content(path: Path) -> bytes | None:
    """Of the file; there is nothing beside it."""
    assert [p for p in path.parent.iterdir() if p != path] == []
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("many", [False, True])
def test_a_file_appears_when_it_is_complete(path: Path, earlier: bytes | None, many: bool) -> None:
    part = path.with_name(f"a.json.{os.getpid()}.part")
    with replacing(path, many=many) as file:
        file.write(b"new")
        assert part.exists()
        assert (path.read_bytes() if path.exists() else None) == earlier
    assert content(path) == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(
    path: Path, earlier: bytes | None, error: type[BaseException]
) -> None:
    def write() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error("why")

    with pytest.raises(error, match=r"^why$"):
        write()
    assert content(path) == earlier


def test_a_full_disk_leaves_what_was_there(path: Path, earlier: bytes | None) -> None:
    with full_disk(1000), pytest.raises(OSError, match="File too large"), replacing(path) as file:
        file.write(bytes(1001))
    assert content(path) == earlier


def test_a_folder_that_is_a_file(path: Path) -> None:
    path.write_bytes(b"")
    with pytest.raises(NotADirectoryError), replacing(path / "b"):
        pass


def test_it_is_on_the_disk_before_it_appears(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)

        def noted(*words: object, name: str = name, call: object = call) -> None:
            assert callable(call)
            calls.append(name)
            call(*words)

        monkeypatch.setattr(os, name, noted)
    write_json(path, {"é": [1.5, None]})
    assert calls == ["fsync", "replace"]
    assert json.loads(path.read_text("utf-8")) == {"é": [1.5, None]}


@pytest.mark.parametrize("name", ["a.json", "a[0].json"])
def test_what_killed_processes_left_is_removed(tmp_path: Path, name: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    ends = [f"{gone.pid}.part", f"{os.getppid()}.part", "mine.part", f"{10**30}.part"]
    others = [f"{name}.{end}" for end in ends] + [f"b.json.{gone.pid}.part"]
    for other in others:
        (tmp_path / other).write_bytes(b"half")
    with replacing(tmp_path / name):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, *others[1:]])
