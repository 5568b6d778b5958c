"""The picture of the imports, and what it must show: no circle, few parts on each level."""

import html

import pytest

from peft_pretraining.errors import UserError
from scripts import import_graph
from tests.end_to_end.common import ROOT


@pytest.mark.parametrize("package", import_graph.PACKAGES)
def test_all_imports_point_downwards(package):
    imports = import_graph.imports_of(package)
    levels = import_graph.levels_of(imports)
    height = {part: k for k, parts in enumerate(levels) for part in parts}
    assert height.keys() == imports.keys()
    assert all(height[used] < height[part] for part in imports for used in imports[part])


def test_few_files_lie_directly_in_peft_pretraining():
    assert len(list((ROOT / "peft_pretraining").glob("*.py"))) <= 8


def test_a_circle_and_a_crowded_level_are_errors():
    with pytest.raises(UserError, match="in a circle: a, b$"):
        import_graph.levels_of({"a": {"b"}, "b": {"a", "c"}, "c": set()})
    with pytest.raises(UserError, match="more than 8 parts on one level"):
        import_graph.levels_of({name: set() for name in "abcdefghi"})


def test_an_arrow_that_others_imply_is_left_out():
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert import_graph.drawn_arrows(imports) == [("a", "b"), ("b", "c")]


def test_the_picture_of_the_documentation_is_up_to_date(tmp_path):
    import_graph.draw(tmp_path / "now.svg")
    for path in (ROOT / "docs/images/import_graph.svg", tmp_path / "now.svg"):
        assert import_graph.description() in html.unescape(path.read_text())
