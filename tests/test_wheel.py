"""The wheel holds all that the packages do and nothing else, and serves where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.training.make import folder as model_folder

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "reft_runtime")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for a build leaves folders beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    out = tmp_path_factory.mktemp("wheel")
    ended = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built)


def outside() -> dict[str, str]:
    """This process's variables without those that show Python the project."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture
def clean(built: Path, tmp_path: Path) -> Path:
    """The `bin` of an environment that has the wheel, and what this one has but the project."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    install = [*pip, "install", "-qq", "--no-deps", "--no-index", str(built)]
    subprocess.run(install, cwd=tmp_path, env=outside(), check=True)
    [packages] = environment.glob("lib/*/site-packages")
    # A folder named in a .pth file is searched, but .pth files in it are not read, as that of an
    # editable install.
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    return environment / "bin"


def test_every_file_of_the_packages_is_in_it(wheel: zipfile.ZipFile) -> None:
    wanted = {
        str(file.relative_to(ROOT))
        for name in PACKAGES
        for file in (ROOT / name).rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == wanted
    assert {f"{name}/py.typed" for name in PACKAGES} <= packed


def test_it_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    about = {name.partition(".dist-info/")[2]: name for name in wheel.namelist()}
    assert b"reft = server.cli.__main__:main" in wheel.read(about["entry_points.txt"])
    assert "licenses/LICENSE" in about
    assert b"Requires-Python: >=3.11" in wheel.read(about["METADATA"])


def test_installed_it_serves_from_an_empty_folder(clean: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    env = outside()
    code = "import server, reft_runtime as r; print(server.__file__, r.__file__, sep='\\n')"
    where = subprocess.run(
        [clean / "python", "-c", code], cwd=empty, env=env, stdout=subprocess.PIPE, text=True
    ).stdout
    assert [Path(line).is_relative_to(clean.parent) for line in where.split()] == [True, True]
    model = model_folder(tmp_path / "tiny")
    server = subprocess.Popen(
        [clean / "reft", "serve", "--model", model, "--port", "0", "--log-level", "error"],
        cwd=empty,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        said = ""
        while "Ready." not in said:
            line = server.stdout.readline()
            assert line, said
            said += line
        url = said.partition("Serving at ")[2].split()[0]
        body = {"prompt": "the good", "max_tokens": 4, "model": "tiny"}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] >= 1
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    assert not list(empty.iterdir())
