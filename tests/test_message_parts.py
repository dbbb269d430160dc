"""The reason of an error of another library, in one line."""

from mlx_openelm.message_parts import describe_error


def test_a_reason_of_several_lines_is_one_line():
    assert describe_error(ValueError("First.\nSecond\n  line ")) == "First. Second line"


def test_the_reason_of_an_os_error_has_no_number_and_path():
    error = FileNotFoundError(2, "No such file", "a.txt")
    assert describe_error(error) == "no such file"
