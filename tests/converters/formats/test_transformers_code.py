"""The folders of `--to hf`: self-contained, and without effect on those of mlx-lm."""

import ast
import json
import subprocess
import sys

import pytest
from commands import call
from places import ROOT

from converters.conversion.run import convert
from converters.formats.transformers_code import write_code
from mlx_openelm.storage.staging import CODE_FILES

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
from converters.conversion.run import convert
convert("demo", sys.argv[1], to="hf")
"""


def test_the_export_needs_no_torch_and_copies_the_code(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCH, tmp_path / "out"]
    subprocess.run(command, check=True, cwd=ROOT)
    for name in CODE_FILES:
        copied = (tmp_path / "out" / name).read_bytes()
        assert copied == (ROOT / "converters" / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    assert set(CODE_FILES) <= set(config["mlx_openelm"]["files"])


def test_the_code_imports_torch_and_transformers_alone(tmp_path):
    write_code(tmp_path)
    imported = set()
    for path in tmp_path.iterdir():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                assert f"{node.module}.py" in CODE_FILES
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def test_folders_for_mlx_have_no_remote_code(here):
    """With auto_map, stock mlx-lm would ask whether to trust remote code."""
    convert("source", "hf", to="hf")
    for source in ("source", "hf"):
        folder = convert(source, f"{source}-again").path
        assert "auto_map" not in json.loads((folder / "config.json").read_text())
        assert not list(folder.glob("*.py"))


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_an_exported_folder_can_be_replaced_and_verified(here, to):
    convert("source", "out", to="hf")
    assert call("verify", "out").exit_code == 0
    with (here / "out" / CODE_FILES[0]).open("a") as file:
        file.write("print()")
    assert "has changed" in call("verify", "out").output
    convert("source", "out", to=to, force=True)
    assert call("verify", "out").exit_code == 0
