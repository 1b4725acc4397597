"""The wheel, in a clean environment, outside the repository."""

import shutil
import site
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")  # built once
REPOSITORY = Path(__file__).parents[2]
KINDS = (".py", ".css")
PARTS = ("ftdist", "conf", "launch", "slurm", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(execute, tmp_path_factory):
    """Built from a copy, so that nothing lands in the tree."""
    place = tmp_path_factory.mktemp("build")
    (place / "tree").mkdir()
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, place / "tree" / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / "tree" / part)
    command = (sys.executable, "-m", "pip", "wheel", place / "tree", "--no-deps", "--no-build-isolation", "-w", place)
    built = execute(*command, cwd=place)
    assert built.status == 0, built
    (file,) = place.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def clean(execute, wheel, tmp_path_factory):
    """A virtual environment with the wheel; what it depends on is seen through a path file, ftdist itself is not."""
    place = tmp_path_factory.mktemp("clean")
    assert execute(sys.executable, "-m", "venv", "--without-pip", place).status == 0
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    own.joinpath("dependencies.pth").write_text("\n".join(site.getsitepackages()))
    pip = (sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--no-deps", "--no-index")
    installed = execute(*pip, wheel, cwd=place)
    assert installed.status == 0, installed
    where = execute(place / "bin" / "python", "-c", "import ftdist; print(ftdist.__file__)", cwd=place).stdout.strip()
    assert Path(where).parent == own / "ftdist"
    return place


def test_every_file_is_in_it(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    code = {str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / "ftdist").rglob("*.*") if f.suffix in KINDS}
    data = {
        f"ftdist/{file.relative_to(REPOSITORY)}"
        for folder in ("conf", "launch", "slurm")
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix in (".yaml", ".json", ".sh", ".sbatch")
    }
    assert len(code) > 30 and len(data) > 50
    assert (code | data) - inside == set()


def test_it_works_outside_the_repository(execute, clean, small, tmp_path):
    ftdist = clean / "bin" / "ftdist"
    listed = execute(ftdist, "ls", "engine", cwd=tmp_path)
    assert listed.status == 0 and "zero3_offload" in listed.stdout
    assert execute(ftdist, "plan", "strategy=lora", cwd=tmp_path).status == 0
    assert list(tmp_path.iterdir()) == []
    trained = execute(ftdist, "train", *small, "engine=zero2", "train.max_steps=2", cwd=tmp_path)
    assert trained.status == 0, trained
    assert (tmp_path / trained.run_dir / "final" / "model.safetensors").is_file()
    assert trained.run_dir.parent == tmp_path / "runs"
