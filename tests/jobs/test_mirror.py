"""Files that a job writes in its own folder arrive in the study's directory."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rankscope.errors import StudyDirectoryError
from rankscope.files import JsonlWriter, write_atomic
from rankscope.jobs import mirror
from rankscope.jobs.mirror import Change, Mirror, Replica, collect, pieces


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.mark.parametrize("seed", range(3))
def test_the_study_has_what_the_job_has(there: Path, here: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever is written, appended, cut back, begun anew and removed, in pieces of a few bytes."""
    monkeypatch.setattr(mirror, "PIECE_BYTES", 7)
    chance = random.Random(seed)
    names = ["trials/a/metrics.jsonl", "trials/a/trial.json", "packs/p/log.txt", "packs/p/checkpoints/s/tensors"]

    def grow(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(chance.randbytes(chance.randrange(40)) + b"\n")

    def cut(path: Path) -> None:
        if path.exists():
            os.truncate(path, chance.randrange(path.stat().st_size + 1))
            grow(path)

    acts: list[Callable[[Path], object]] = [
        grow, grow, cut, lambda path: path.unlink(missing_ok=True),
        lambda path: write_atomic(path, chance.randbytes(chance.randrange(30))),
    ]  # fmt: skip
    for name in names:
        grow(there / name)
    for name in files(there):
        Replica(here).apply(pieces(there, name))
    assert files(here) == files(there)
    watched, replica = Mirror(there), Replica(here)
    for _ in range(60):
        for _ in range(chance.randrange(4)):
            chance.choice(acts)(there / chance.choice(names))
        replica.apply(list(watched.changes()))
        assert files(here) == files(there)


def test_of_metrics_only_what_is_new_is_sent(there: Path) -> None:
    with JsonlWriter(there / "metrics.jsonl") as log:
        log.write({"step": 1})
        watched = Mirror(there)
        assert list(watched.changes()) == []
        log.write({"step": 2})
        assert list(watched.changes()) == [Change("metrics.jsonl", b'{"step": 2}\n', 12, True, True)]
        assert list(watched.changes()) == []


def test_metrics_that_were_cut_back_and_grew_past_what_they_were_are_sent_whole(there: Path) -> None:
    file = there / "metrics.jsonl"
    file.write_bytes(b"one\ntwo\n")
    watched = Mirror(there)
    os.truncate(file, 4)
    with file.open("ab") as more:
        more.write(b"2nd\nthree\n")
    assert list(watched.changes()) == [Change("metrics.jsonl", b"one\n2nd\nthree\n", 0, True, True)]


def test_what_tells_of_others_was_read_before_them_and_comes_after_them(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that ends while it is looked at is told of as it was, or with all that it has."""
    watched = Mirror(there)
    write_atomic(there / "trials/a/trial.json", "running")
    names, calls = Mirror._names, []

    def ends_meanwhile(self: Mirror) -> list[str]:
        calls.append(1)
        if len(calls) == 2:  # after what tells was read
            write_atomic(there / "trials/a/eval.json", "losses")
            write_atomic(there / "trials/a/trial.json", "done")
        return names(self)

    monkeypatch.setattr(Mirror, "_names", ends_meanwhile)
    assert [(change.name, change.data) for change in watched.changes()] == [
        ("trials/a/eval.json", b"losses"),
        ("trials/a/trial.json", b"running"),
    ]
    assert [(change.name, change.data) for change in watched.changes()] == [("trials/a/trial.json", b"done")]


def test_a_checkpoint_s_manifest_comes_after_its_files_and_goes_after_them(there: Path) -> None:
    for name in ("manifest.json", "state.json", "tensors.safetensors"):
        write_atomic(there / "packs/p/checkpoints/step-1" / name, name)
    watched = Mirror(there)
    for name in ("manifest.json", "state.json", "tensors.safetensors"):
        (there / "packs/p/checkpoints/step-1" / name).unlink()
        write_atomic(there / "packs/p/checkpoints/step-2" / name, name)
    changes = [(change.name.rpartition("/")[2], change.data is None) for change in watched.changes()]
    assert changes[2] == ("manifest.json", False)
    assert [gone for _, gone in changes] == [False] * 3 + [True] * 3
    assert changes[3] == ("manifest.json", True)  # without which the others are no checkpoint


def test_a_file_that_is_being_written_is_not_sent(there: Path) -> None:
    watched = Mirror(there)
    (there / ".trial.json.abcdefgh.tmp").write_text("half")
    assert list(watched.changes()) == []


def test_a_folder_that_is_empty_goes_too(here: Path) -> None:
    write_atomic(here / "packs/p/checkpoints/step-1/state.json", "x")
    Replica(here).apply([Change("packs/p/checkpoints/step-1/state.json")])
    assert [path.name for path in here.iterdir()] == []
    Replica(here).apply([Change("packs/p/checkpoints/step-1/state.json")])  # and what is gone already is no error


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "link/outside"])
def test_nothing_is_written_outside_of_the_study(here: Path, tmp_path: Path, name: str) -> None:
    (here / "link").symlink_to(tmp_path)
    for change in (Change(name, b"x"), Change(name, b"x", appended=True), Change(name)):
        with pytest.raises(StudyDirectoryError, match=r"no name of a file|leads out"):
            Replica(here).apply([change])
    assert not (tmp_path / "outside").exists()


def test_what_a_job_needs_is_collected(there: Path) -> None:
    for name in ("study.yaml", "data/facts.json", "data/.hidden", "packs/p/pack.json"):
        write_atomic(there / name, name)
    assert collect(there, ("study.yaml", "data", "packs/none", "trials")) == ["study.yaml", "data/facts.json"]
    with pytest.raises(StudyDirectoryError):
        collect(there, ("../there",))


def test_an_empty_file_arrives(there: Path, here: Path) -> None:
    (there / "empty").touch()
    Replica(here).apply(pieces(there, "empty"))
    assert files(here) == {"empty": b""}
