"""Files that are there whole or not at all."""

import threading

import pytest
import torch

from container.files import write_atomically
from container.training import Checkpoints, Progress
from container.training.checkpoint import _digest


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for step in (1, 20, 300):
        checkpoints.save(step, dict(weights=torch.full((3,), step), progress=dict(history=[dict(loss=1.5)])))
    assert [path.name[:19] for path in checkpoints.paths()] == ["checkpoint-00000300", "checkpoint-00000020"]
    loaded = checkpoints.load()
    assert loaded["weights"].tolist() == [300] * 3 and loaded["progress"] == dict(history=[dict(loss=1.5)])


def test_a_thread_writes_what_was_then(tmp_path, monkeypatch):
    """Training goes on meanwhile, and changes the weights; one write at a time; what fails is told by the next call."""
    others = threading.enumerate()
    checkpoints, go = Checkpoints(tmp_path), threading.Event()
    monkeypatch.setattr(
        "container.training.checkpoint.write_atomically", lambda *it: (go.wait(60), write_atomically(*it))
    )
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    before = layer.weight.detach().clone()
    checkpoints.begin(1, dict(state_dict=layer.state_dict(), optimizer=optimizer.state_dict(), lists=[layer.weight]))
    torch.nn.init.zeros_(layer.weight)
    assert not checkpoints.paths()
    go.set()
    checkpoints.finish()
    saved = checkpoints.load()
    assert torch.equal(saved["state_dict"]["weight"], before) and torch.equal(saved["lists"][0], before)
    (tmp_path / "gone").mkdir()
    lost = Checkpoints(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    lost.begin(1, {})
    with pytest.raises(FileNotFoundError):
        lost.begin(2, {})
    lost.finish()
    for pool in (checkpoints, lost):
        pool.close()
    assert set(threading.enumerate()) <= set(others)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_damage_of_any_kind_is_noticed(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, dict(step=step, weights=torch.rand(100)))
    newest, _ = checkpoints.paths()
    data = bytearray(newest.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    newest.write_bytes(data[:-1] if damage == "truncated" else data if damage == "one bit" else b"")
    assert checkpoints.load()["step"] == 1
    assert f"{newest} is damaged" in capsys.readouterr().err
    checkpoints.paths()[0].write_bytes(b"")
    assert checkpoints.load() is None


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    torch.save(dict(state=Evil()), tmp_path / "evil")
    data = (tmp_path / "evil").read_bytes()
    (tmp_path / f"checkpoint-00000001-{_digest(data)}.pth").write_bytes(data)
    with pytest.raises(ValueError, match="is no checkpoint of tensors and plain values"):
        Checkpoints(tmp_path).load()
    assert not (tmp_path / "executed").exists()


def test_progress_begins_at_the_start():
    assert Progress() == Progress(epoch=0, step=0, best=None, history=[])
