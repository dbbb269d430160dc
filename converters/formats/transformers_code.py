"""The code that transformers runs an exported folder with (`trust_remote_code`)."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from mlx_openelm.storage.staging import CODE_FILES

# Only in folders for transformers: it makes every AutoTokenizer, and so mlx-lm, ask
# about remote code.
AUTO_MAP: Mapping[str, Mapping[str, str]] = {
    "auto_map": {
        "AutoConfig": "configuration_openelm.OpenELMConfig",
        "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
    }
}


def write_code(folder: Path) -> None:
    """Copy the modules that import nothing but torch and transformers."""
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).parents[1] / name, folder / name)
