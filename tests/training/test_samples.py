"""samples.txt: a section a step, whatever was stopped and whatever a model writes."""

from llm_jax.training.samples import SampleFile


def test_sections_in_order(tmp_path):
    file = SampleFile(tmp_path / "samples.txt")
    assert file.read() == {}
    file.add(10, "one\n")
    file.add(20, "two\n\n")
    assert file.read() == {10: "one\n", 20: "two\n\n"}
    assert (tmp_path / "samples.txt").read_text() == "=== step 10 ===\none\n=== step 20 ===\ntwo\n\n"


def test_no_step_stands_twice(tmp_path):
    """An attempt that got to 30 was killed; the next goes on from 10."""
    whole, cut = SampleFile(tmp_path / "whole"), SampleFile(tmp_path / "cut")
    for step in (10, 20, 30, 40):
        whole.add(step, f"at {step}\n")
    for step in (10, 20, 30, 20, 30, 40):
        cut.add(step, f"at {step}\n")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    cut.add(20, "anew\n")
    assert cut.read() == {10: "at 10\n", 20: "anew\n"}


def test_a_model_that_writes_headers(tmp_path):
    file = SampleFile(tmp_path / "samples.txt")
    nasty = "a\n=== step 5 ===\nb\r=== step 6 ===\nc\r\n"
    file.add(10, nasty)
    file.add(20, "=== step 20 ===\n")
    assert list(file.read()) == [10, 20]
    assert file.read()[10] == nasty.replace("\n===", "\n ===")
