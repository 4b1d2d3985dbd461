"""A study from somebody else stays in its own folder: names and symbolic links lead nowhere else."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankscope.cli import main
from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import inside, write_json
from rankscope.spec.options import assemble, read_study_file
from rankscope.spec.resolve import resolve_spec
from rankscope.study.study import Study
from report.report_evidence import make_evidence, make_spec

SPEC = make_spec(ranks=[8], seeds=[0], reference={"full": True})
TRIAL = SPEC.trials()[0]
FULL = SPEC.reference_trials()[0]

SECRET = "PRIVATE KEY"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Files of the user that no study may touch."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    write_json(folder / "trial.json", {"status": "failed", "reason": SECRET})
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study that can be reported: nothing has run yet."""
    study = Study.create(tmp_path / "study", SPEC)
    evidence = make_evidence(SPEC)
    write_json(study.path / "machine.json", evidence.machine)
    facts = evidence.data_facts | {"rows_without_label_dropped": 0, "mean_length": 122.0}
    write_json(study.path / "data" / "facts.json", facts)
    return study.path


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def report(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """`rankscope report PATH`; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["rankscope", "report", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


LINKS: dict[str, Callable[[Path], Path]] = {
    f"trials/{TRIAL.name}/trial.json": lambda home: home / "trial.json",
    f"trials/{TRIAL.name}/metrics.jsonl": lambda home: home / "secret",
    f"trials/{TRIAL.name}/eval.json": lambda home: home / "secret",
    f"trials/{TRIAL.name}/adapter": lambda home: home,
    f"trials/{TRIAL.name}": lambda home: home,
    "trials": lambda home: home,
    f"reference/{FULL.name}/trial.json": lambda home: home / "trial.json",
    "packs/p000": lambda home: home,
    "packs/p000/checkpoints": lambda home: home,
    "packs/p000/log.txt": lambda home: home / "secret",
    "profiles/r008.json": lambda home: home / "secret",
    "profiles/jobs": lambda home: home,
    "data": lambda home: Path("/"),
    "data/facts.json": lambda home: home / "secret",
    "machine.json": lambda home: home / "secret",
    "prediction.json": lambda home: home / "secret",
    "verdict.json": lambda home: home / "secret",
    "study.yaml": lambda home: home / "secret",
    "report": lambda home: home,
    "report/index.html": lambda home: home / "secret",
    "report/figures": lambda home: home,
    "report/figures/train-loss.svg": lambda home: home / "does-not-exist-yet",
    ".lock": lambda home: home / "secret",
    "trials/up": lambda home: Path("../../home"),
    "trials/round": lambda home: Path("round"),
    "packs/p000/deep/inside/it": lambda home: home,
}
"""A link in the study, and where it points to."""


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_study_is_refused_before_anything_is_read_or_written(
    name: str, study: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(outside)
    link(study / name, LINKS[name](outside))
    assert report(study, monkeypatch) == 2
    told = "".join(capsys.readouterr())
    assert f"{study / name}: a symbolic link that leads out of {study}" in told
    assert SECRET not in told
    assert contents(outside) == before
    with pytest.raises(StudyDirectoryError, match="symbolic link"):  # as `run` would
        Study.create(study, SPEC)


def test_the_same_study_without_the_link_is_reported(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report(study, monkeypatch) == 0
    assert (study / "report" / "index.html").is_file()


def test_links_that_stay_inside_and_a_link_to_the_study_itself_are_fine(study: Path, tmp_path: Path) -> None:
    (study / "elsewhere").mkdir()
    write_json(study / "elsewhere" / "trial.json", {"status": "failed"})
    link(study / "trials" / TRIAL.name, Path("../elsewhere"))
    (tmp_path / "short").symlink_to(study)
    assert Study.open(tmp_path / "short").trial_record(TRIAL).status == "failed"


def test_a_pipe_is_refused_rather_than_waited_for(study: Path) -> None:
    (study / "trials" / TRIAL.name).mkdir(parents=True)
    os.mkfifo(study / "trials" / TRIAL.name / "trial.json")
    with pytest.raises(StudyDirectoryError, match="neither a file nor a folder"):
        Study.open(study)


def test_a_folder_that_can_be_listed_but_not_entered_is_passed_over(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, since root may enter every folder: all that is asked about a file in it is denied."""
    (study / "closed").mkdir()
    (study / "closed" / "file").touch()
    asked = {name: getattr(os, name) for name in ("stat", "lstat")}

    def deny(name: str) -> Callable[..., os.stat_result]:
        def ask(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
            if not isinstance(path, int) and os.fspath(path) == str(study / "closed" / "file"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            found: os.stat_result = asked[name](path, *arguments, **options)
            return found

        return ask

    for name in asked:
        monkeypatch.setattr(os, name, deny(name))
    Study.open(study)


@pytest.mark.parametrize("name", ["..", "../home", "a/../../home", "/etc/passwd", "a\0b", "packs/../../home"])
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StudyDirectoryError, match="is no name of a file in it"):
        inside(tmp_path, name)
    with pytest.raises(StudyDirectoryError):
        inside(tmp_path, "packs", name)


@pytest.mark.parametrize("name", ["a", "a.b", "..a", "a..b/c", "-", "r008-lr2e-4-s0", "한글"])
def test_other_names_are_joined(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, "packs", name) == tmp_path / "packs" / name


@pytest.mark.parametrize("name", ["../../home", "/etc", "a/../../../home"])
def test_packs_are_named_by_a_file_of_the_study_but_stay_in_it(name: str, study: Path, outside: Path) -> None:
    """Folders of these names are written to, and their checkpoints removed."""
    (outside / "checkpoints").mkdir()
    write_json(study / "packs" / "division.json", {"packs": {name: [TRIAL.name]}, "divided": {}})
    opened = Study.open(study)
    with pytest.raises(StudyDirectoryError):
        opened.division()
    with pytest.raises(StudyDirectoryError):
        opened.pack_record(name)
    assert (outside / "checkpoints").is_dir()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0", "a\n", "a\x1b[31m", "-rf", ".hidden", "~", "a b", "a" * 300],
)
def test_a_study_s_name_is_a_plain_file_name(name: str) -> None:
    with pytest.raises(StudyError, match="name"):
        resolve_spec({"name": name, "model": {"id": "m"}, "data": {"id": "d"}})


@pytest.mark.parametrize(
    "id", ["../../etc/passwd", "/", "..", "-rf", "a\0b\n", "$(reboot)", "한글", "x" * 5000, "a/" * 99]
)
def test_a_name_made_from_model_and_data_is_one_too(id: str) -> None:
    name = assemble({}, {"model": id, "dataset": id}).name
    assert Path(name).parts == (name,)
    assert name[0].isalnum()
    assert len(name) <= 100


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "&a [*a]"]
)
def test_yaml_is_data(text: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (study / "study.yaml").write_text(f"name: {text}\n")
    with pytest.raises(StudyError):
        Study.open(study)
    with pytest.raises(StudyError):
        assemble(read_study_file(study / "study.yaml"), {})
    with pytest.raises(StudyError):
        assemble({"model": {"id": "m"}, "data": {"id": "d"}}, {}, [f"name={text}"])
    assert not (tmp_path / "ran").exists()
