"""A folder gets its name when it is complete; work that stopped goes on, unless it was other work."""

import pytest

from mlx_edge.conversion.job import check_target, find_place, open_job
from mlx_edge.errors import InvalidRequestError


def stop(target, key="a", *, files=("model-1.safetensors",), error=RuntimeError):
    """Work that ends by an error after it wrote some files."""
    with pytest.raises(error), open_job(target, key) as job:
        for name in files:
            (job.folder / name).write_text("whole")
        raise error("stopped")


def finish(target, key="a", text="new", **options):
    with open_job(target, key, **options) as job:
        (job.folder / "config.json").write_text(text)
        job.finish()


def test_it_appears_when_it_is_complete_and_nothing_stays_beside(tmp_path):
    target = tmp_path / "deep" / "model"
    with open_job(target, "a") as job:
        (job.folder / "config.json").write_text("{}")
        assert not target.exists()
        job.finish()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "{}"


def test_the_same_work_goes_on_and_strays_go(tmp_path):
    stop(tmp_path / "m")
    place = find_place(tmp_path / "m")
    (place / "model" / ".x.0123.tmp").write_text("stray")
    with open_job(tmp_path / "m", "a") as job:
        assert [path.name for path in job.folder.iterdir()] == ["model-1.safetensors"]


def test_other_work_begins_anew(tmp_path):
    stop(tmp_path / "m")
    with open_job(tmp_path / "m", "b") as job:
        assert not list(job.folder.iterdir())


def test_an_error_before_anything_is_whole_leaves_nothing(tmp_path):
    stop(tmp_path / "m", files=("config.json",), error=InvalidRequestError)
    assert not list(tmp_path.iterdir())
    stop(tmp_path / "m", error=InvalidRequestError)  # what is whole is kept
    assert find_place(tmp_path / "m").exists()


def test_two_at_once_are_refused(tmp_path):
    with (
        open_job(tmp_path / "m", "a"),
        pytest.raises(InvalidRequestError, match="is in use"),
        open_job(tmp_path / "m", "a"),
    ):
        pass


def test_an_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "m"
    finish(target, text="old")
    with pytest.raises(InvalidRequestError, match="--force"), open_job(target, "a"):
        pass
    with pytest.raises(RuntimeError), open_job(target, "a", is_forced=True):
        raise RuntimeError
    assert (target / "config.json").read_text() == "old"
    finish(target, text="new", is_forced=True)
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_killed_between_the_two_renamings_the_old_one_comes_back(tmp_path):
    target = tmp_path / "m"
    finish(target, text="old")
    with pytest.raises(RuntimeError), open_job(target, "a", is_forced=True) as job:
        (job.folder / "config.json").write_text("new")
        target.rename(job.place / "old")
        raise RuntimeError
    with pytest.raises(InvalidRequestError, match="--force"):
        check_target(target, is_forced=False)
    assert (target / "config.json").read_text() == "old"
    finish(target, text="new", is_forced=True)
    assert (target / "config.json").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder of others", "link"])
def test_force_removes_nothing_but_model_folders(tmp_path, kind):
    target = tmp_path / "m"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        finish(tmp_path / "other")
        target.symlink_to(tmp_path / "other")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequestError, match="no model folder"):
        check_target(target, is_forced=True)
