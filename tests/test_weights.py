"""Weights come back as they were saved, or are refused in one sentence."""

import errno
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithm.cascade import weights
from algorithm.cascade.network import Cascade, CascadeSettings
from algorithm.cascade.weights import FILE, MANIFEST, find_weights, load_cascade, save_cascade
from algorithm.errors import InputError
from algorithm.geometry import Grid

TINY = CascadeSettings(features=(2, 4), factors=(2, 1), network_size=(8, 8, 12))


@pytest.fixture
def cascade() -> Cascade:
    torch.manual_seed(0)
    return Cascade(TINY)


@pytest.fixture
def folder(cascade: Cascade, tmp_path: Path) -> Path:
    save_cascade(tmp_path, cascade, {"scans": 3})
    return tmp_path


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(manifest))


def replace_weights(folder: Path, content: bytes) -> None:
    """Other content, with the right hash in the manifest."""
    (folder / FILE).write_bytes(content)
    edit_manifest(folder, sha256=hashlib.sha256(content).hexdigest())


def refusal(path: Path) -> str:
    """What the user is told."""
    with pytest.raises(InputError) as caught:
        load_cascade(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip(cascade: Cascade, folder: Path) -> None:
    loaded = load_cascade(folder)
    assert loaded.cascade.settings == TINY
    assert loaded.sha256 == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    state = loaded.cascade.state_dict()
    assert state.keys() == cascade.state_dict().keys()
    for name, value in cascade.state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value.half().float()), name
    assert not loaded.cascade.training
    assert not any(p.requires_grad for p in loaded.cascade.parameters())


def test_saving_that_fails_leaves_the_old_weights(
    cascade: Cascade, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to a file that is in use: it appears whole, or not at all."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        next(cascade.parameters()).add_(1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_cascade(folder, cascade, {"scans": 4})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    load_cascade(folder)


def test_the_loaded_cascade_predicts_the_same(cascade: Cascade, folder: Path) -> None:
    grid = Grid((8, 8, 12), spacing=(2.0, 2.0, 2.0))
    fixed, moving = 300 * torch.randn(2, 1, 1, *grid.shape) - 600
    expected, _ = cascade(fixed, grid, moving, grid)
    found, _ = load_cascade(folder).cascade(fixed, grid, moving, grid)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_the_manifest_says_what_is_needed_to_rebuild_and_check(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["settings"] == TINY.to_dict()
    assert manifest["training"] == {"scans": 3}
    assert {value.dtype for value in load_file(folder / manifest["file"]).values()} == {torch.float16}


def test_a_file_or_its_folder(folder: Path) -> None:
    assert load_cascade(folder / FILE).sha256 == load_cascade(folder).sha256
    (folder / FILE).rename(folder / "other.safetensors")
    assert "describes cascade.safetensors, not this file" in refusal(folder / "other.safetensors")


def test_an_altered_byte_is_refused(folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    for position in (0, len(content) // 2, len(content) - 1):
        altered = content.copy()
        altered[position] ^= 1
        (folder / FILE).write_bytes(altered)
        assert "the weights were altered" in refusal(folder)
    (folder / FILE).write_bytes(content)
    load_cascade(folder)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere" / MANIFEST) in refusal(tmp_path / "nowhere")
    (folder / FILE).unlink()
    message = refusal(folder)
    assert str(folder / FILE) in message
    assert "cannot be read (No such file or directory)" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b'"file sha256 settings"', b"{}", b'{"file": "a", "sha256": "b"}', b"\xff\xfe\x00"],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert "expected a JSON object with file, sha256 and settings" in refusal(folder)


@pytest.mark.parametrize("value", [None, 7, ["a"]])
@pytest.mark.parametrize("entry", ["file", "sha256"])
def test_manifest_entries_of_another_type_are_refused(folder: Path, entry: str, value: Any) -> None:
    edit_manifest(folder, **{entry: value})
    refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"features": [2, 5]},
        lambda s: s | {"features": [2, 4, 8]},
        lambda s: s | {"features": 3},
        lambda s: s | {"features": []},
        lambda s: s | {"features": [-2, -4]},
        lambda s: s | {"features": ["a", "b"]},
        lambda s: s | {"factors": [4, 2, 1]},
        lambda s: s | {"network_size": [8, 8]},
        lambda s: s | {"network_size": None},
        lambda s: {name: s[name] for name in ("features", "factors")},
        lambda s: [2, 4],
        lambda s: None,
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, change: Callable[[Any], Any]) -> None:
    edit_manifest(folder, settings=change(TINY.to_dict()))
    assert "do not fit the settings" in refusal(folder)


def test_weights_that_lack_or_add_a_tensor_are_refused(folder: Path) -> None:
    state = load_file(folder / FILE)
    first = next(iter(state))
    for other in ({k: v for k, v in state.items() if k != first}, state | {"more": torch.zeros(1)}):
        save_file(other, folder / "other")
        replace_weights(folder, (folder / "other").read_bytes())
        assert "do not fit the settings" in refusal(folder)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    "save", [lambda trap: pickle.dumps(trap), lambda trap: b"", lambda trap: b"\x08" + bytes(7) + b"{}      "]
)
def test_nothing_is_unpickled(folder: Path, save: Callable[[Trap], bytes]) -> None:
    sprung = folder / "sprung"
    replace_weights(folder, save(Trap(sprung)))
    assert "do not fit the settings" in refusal(folder)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap does work


def test_weights_saved_by_torch_are_refused(cascade: Cascade, folder: Path) -> None:
    torch.save(cascade.state_dict(), folder / "pickled")
    replace_weights(folder, (folder / "pickled").read_bytes())
    assert "do not fit the settings" in refusal(folder)


def test_given_weights_come_before_the_platform_s_and_the_bundled(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(weights, "PLATFORM", folder / "platform")
    assert find_weights(None) == weights.BUNDLED
    (folder / "platform").mkdir()
    assert find_weights(None) == weights.BUNDLED  # the platform makes the folder even when nothing was uploaded
    (folder / "platform" / MANIFEST).write_text("{}")
    assert find_weights(None) == folder / "platform"
    assert find_weights(folder) == folder
