"""Names that are nearly those of a model, and paths of something else."""

import pytest
from commands import expect_error

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
    expect_error(names, *arguments, name, message=f" Similar names: {similar}")


def test_a_folder_of_another_place_is_proposed(names):
    name = names / "my-model-2"
    expect_error(
        names, *GENERATE, name, message=f"Similar names: {names / 'my-model'}."
    )


@pytest.mark.parametrize("name", ["nowhere", "mistral", "org/phi-2", "~nobody/x"])
def test_other_names_are_not_similar(names, name):
    assert "Similar" not in expect_error(names, *GENERATE, name, message=name)


def test_a_text_file_is_not_to_be_converted(names):
    (names / "README.md").write_text("# A model")
    message = expect_error(
        names, *GENERATE, "README.md", message="is a file, not a model"
    )
    assert "convert" not in message
    (names / "a b.pt").write_bytes(b"")
    expect_error(names, *GENERATE, "a b.pt", message="`mlx-openelm convert 'a b.pt'`")


def test_an_adapter_is_passed_as_one(names):
    (names / "adapter").mkdir()
    (names / "adapter" / "adapter_config.json").write_text("{}")
    message = expect_error(
        names, *GENERATE, "adapter", message="pass it as --adapter-path"
    )
    assert "convert" not in message
