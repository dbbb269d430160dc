"""Names that are nearly those of a model, and paths of something else."""

import pytest
from commands import refuse

GENERATE = ("generate", "Hi", "--model")


@pytest.fixture
def names(here):
    """Model folders with other names, and one that is no model."""
    (here / "model").rename(here / "demo-4bit")
    (here / "source").rename(here / "my-model")
    (here / "demo-4bits").mkdir()
    return here


@pytest.mark.parametrize("arguments", [GENERATE, ("inspect",), ("convert",)])
@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("demo4bit", "demo-4bit."),
        ("./Demo-4bit-", "demo-4bit."),
        ("my-modle", "my-model."),
        ("Demo", "demo."),
        ("apple/OpenELM-270", "apple/OpenELM-270M."),
        ("OpenELM-1_1B-instrct", "apple/OpenELM-1_1B-Instruct."),
        ("aple/OpenELM-3B", "apple/OpenELM-3B."),
    ],
)
def test_the_nearest_name_is_proposed(names, arguments, name, similar):
    refuse(names, *arguments, name, says=f" Similar names: {similar}")


def test_a_folder_of_another_place_is_proposed(names):
    name = names / "my-model-2"
    refuse(names, *GENERATE, name, says=f"Similar names: {names / 'my-model'}.")


@pytest.mark.parametrize("name", ["nowhere", "mistral", "org/phi-2", "~nobody/x"])
def test_other_names_are_not_similar(names, name):
    assert "Similar" not in refuse(names, *GENERATE, name, says=name)


def test_a_text_file_is_not_to_be_converted(names):
    (names / "README.md").write_text("# A model")
    message = refuse(names, *GENERATE, "README.md", says="is a file, not a model")
    assert "convert" not in message
    (names / "a b.pt").write_bytes(b"")
    refuse(names, *GENERATE, "a b.pt", says="`mlx-openelm convert 'a b.pt'`")


def test_an_adapter_is_passed_as_one(names):
    (names / "adapter").mkdir()
    (names / "adapter" / "adapter_config.json").write_text("{}")
    message = refuse(names, *GENERATE, "adapter", says="pass it as --adapter-path")
    assert "convert" not in message
