"""Contents of wheel and sdist, and the installed package."""

import email.message
import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT

import mlx_openelm

PACKAGES = ("converters", "mlx_openelm")
VERSION = mlx_openelm.__version__


def run(command: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    """Run without the variables of this test run; return stdout."""
    ours = ("MAKE", "MFLAGS", "MLX_", "PYTEST", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=kept | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = run([*git, "--cached", "--others", "--exclude-standard"], ROOT)
    copy = tmp_path_factory.mktemp("checkout")
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist."""
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run([*build, "--outdir", dist, checkout], dist)
    return dist


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    return built / f"mlx_openelm-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"mlx_openelm-{VERSION}-py3-none-any.whl"


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_wheel_has_the_packages_and_the_recipes(checkout: Path, wheel: Path) -> None:
    expected = {f"mlx_openelm/recipes/{name}" for name in files(checkout / "recipes")}
    for package in PACKAGES:
        expected |= {f"{package}/{name}" for name in files(checkout / package)}
    with zipfile.ZipFile(wheel) as archive:
        contents = set(archive.namelist())
    assert {name for name in contents if ".dist-info/" not in name} == expected
    assert f"mlx_openelm-{VERSION}.dist-info/licenses/LICENSE" in contents
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert "mlx_openelm/recipes/pretrain/stories.yaml" in expected
    templates = {"page.css", "palette.css", "picture.svg", "training_report.html"}
    assert {f"mlx_openelm/reporting/templates/{name}" for name in templates} <= expected


def test_demo_model_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        demo = {
            info.filename.removeprefix("mlx_openelm/demo/"): info.file_size
            for info in archive.infolist()
            if info.filename.startswith("mlx_openelm/demo/")
        }
    needed = {"config.json", "generation_config.json", "tokenizer.model", "README.md"}
    assert needed <= demo.keys()
    assert any(name.endswith(".safetensors") for name in demo)
    assert sum(demo.values()) <= 16e6


def test_sdist_and_checkout_build_the_same_wheel(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    run([*build, "--outdir", tmp_path, checkout], tmp_path)
    with (
        zipfile.ZipFile(wheel) as first,
        zipfile.ZipFile(tmp_path / wheel.name) as second,
    ):
        assert {i.filename: i.CRC for i in first.infolist()} == {
            i.filename: i.CRC for i in second.infolist()
        }


def test_sdist_holds_the_tests_and_no_leftovers(checkout: Path, sdist: Path) -> None:
    prefix = f"mlx_openelm-{VERSION}/"
    with tarfile.open(sdist) as archive:
        contents = {name.removeprefix(prefix) for name in archive.getnames()}
    assert {f"tests/{name}" for name in files(checkout / "tests")} <= contents
    assert {"LICENSE", "Makefile", "README.md", "pyproject.toml"} <= contents
    assert contents - {"PKG-INFO"} <= files(checkout)


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"mlx_openelm-{VERSION}.dist-info/METADATA").decode()
    return email.parser.Parser().parsestr(text)


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("darwin", "arm64", [set()]),
        ("linux", "x86_64", [{"cpu"}]),
        ("darwin", "x86_64", []),
    ],
)
def test_mlx_follows_the_platform(
    metadata: email.message.Message, system: str, machine: str, expected: list[set[str]]
) -> None:
    here = {"sys_platform": system, "platform_machine": machine, "extra": ""}
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    extras = [
        requirement.extras
        for requirement in requirements
        if requirement.name == "mlx"
        and requirement.marker is not None
        and requirement.marker.evaluate(here)
    ]
    assert extras == expected


def test_metadata_names_version_and_licence(metadata: email.message.Message) -> None:
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = ["eval", "gguf", "parquet", "tensorboard", "torch", "trackio", "wandb"]
    assert metadata.get_all("Provides-Extra") == extras


def test_every_package_has_a_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["id"] == "layers")
    listed = {n for layer in contract["layers"] for n in re.split(" [|:] ", layer)}
    names = {
        f"{package}.{path.stem}"
        for package in PACKAGES
        for path in (ROOT / package).iterdir()
        if (path / "__init__.py").is_file() or path.suffix == ".py"
    }
    assert names - {f"{package}.__init__" for package in PACKAGES} == listed


# `make` looks for Python -----------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder that serves as PATH on an Apple silicon Mac without any Python."""
    (tmp_path / "sh").symlink_to("/bin/sh")
    for name, answer in (("uname", "Darwin"), ("sysctl", "1")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def put_python(path: Path, name: str, version: tuple[int, int], machine: str) -> None:
    """Put a Python into `path` that reports this version and machine."""
    overrides = (
        f"import ensurepip, platform, sys, venv; sys.platform = 'darwin'; "
        f"sys.version_info = {version}; platform.machine = lambda: '{machine}'; "
        "exec(sys.argv[1])"
    )
    script = path / name
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{overrides}" "$2"\n')
    script.chmod(0o755)


def which_python(path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "--silent", "which-python"],
        cwd=ROOT,
        env={"PATH": str(path), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_make_uses_the_first_supported_python(path: Path) -> None:
    put_python(path, "python3.13", (3, 13), "x86_64")
    put_python(path, "python3.12", (3, 12), "arm64")
    put_python(path, "python3", (3, 9), "arm64")
    broken = path / "python3.11"  # like pyenv's shims of versions that are not active
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    assert which_python(path).stdout == f"{path}/python3.12\n"


@pytest.mark.parametrize(
    ("version", "machine", "reason"),
    [
        ((3, 12), "x86_64", "runs under Rosetta; MLX needs an arm64 Python"),
        ((3, 10), "arm64", "is Python 3.10"),
    ],
)
def test_make_reports_why_a_python_is_not_supported(
    path: Path, version: tuple[int, int], machine: str, reason: str
) -> None:
    put_python(path, "custom", version, machine)
    result = which_python(path, PYTHON="custom")
    assert result.returncode != 0
    assert not result.stdout
    assert reason in result.stderr
    assert "brew install python" in result.stderr


def test_make_refuses_an_intel_mac(path: Path) -> None:
    (path / "sysctl").write_text("#!/bin/sh\nexit 1\n")
    put_python(path, "python3.13", (3, 13), "x86_64")
    result = which_python(path)
    assert result.returncode != 0
    assert "Apple silicon" in result.stderr


# Installing ------------------------------------------------------------------------

REPORT = """
import importlib.util, json
import converters, mlx_openelm
from mlx_openelm import convert
from mlx_openelm.recipe_loader import bundled_recipes
print(json.dumps({
    "files": [mlx_openelm.__file__, converters.__file__],
    "recipes": list(bundled_recipes()),
    "torch": importlib.util.find_spec("torch") is not None,
}))
"""


@pytest.mark.proof
@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_clean_environment(
    form: str, request: pytest.FixtureRequest, checkout: Path, tmp_path: Path
) -> None:
    """Install with all dependencies and run outside the checkout."""
    work = tmp_path / "work"
    work.mkdir()
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", environment], work)
    if form == "editable":
        location, package = checkout, ["-e", checkout]
    else:
        location, package = environment, [request.getfixturevalue(form)]
    run([environment / "bin/pip", "install", "--quiet", *package], work)

    report = json.loads(run([environment / "bin/python", "-c", REPORT], work))
    assert all(Path(file).is_relative_to(location) for file in report["files"])
    assert "pretrain/stories" in report["recipes"]
    assert not report["torch"]

    program = environment / "bin/mlx-openelm"
    assert VERSION in run([program, "--version"], work)
    assert "pretrain/stories" in run([program, "recipes"], work)
    generate = [program, "generate", "--prompt", "Once", "--max-tokens", "5"]
    assert run(generate, work, HF_HUB_OFFLINE="1").strip()
