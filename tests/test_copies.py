"""Declared copies are identical to their home, whole and to the letter.    python tests/test_copies.py --fix   brings them up to date.

`# Copied from FILE.py` right above a top-level class or def (or its decorator) declares that the block below it equals the
block of the same name in FILE.py.
"""
import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"^# Copied from (\w+\.py)$")


@functools.lru_cache                                    # each file is asked for every copy in it
def blocks(source):
    """{name: (first line, last line)} of the top-level classes and functions, decorators included, counted from 0."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = (first - 1, node.end_lineno)
    return found


def copies(root=ROOT):
    """[(file, name, home)] of every declared copy. Raises ValueError for a mark with no block below it."""
    found = []
    for path in sorted(root.glob("*.py")):
        source = path.read_text()
        starts = {first: name for name, (first, _) in blocks(source).items()}
        for number, line in enumerate(source.splitlines()):
            if match := MARK.match(line):
                if number + 1 not in starts:
                    raise ValueError(f"{path.name}:{number + 1}: no class or def right below '{line}'")
                found.append((path, starts[number + 1], root / match[1]))
    return found


def text(path, name):
    source = path.read_text()
    if name not in blocks(source):
        raise ValueError(f"{path.name} has no {name}")
    first, last = blocks(source)[name]
    return source.splitlines()[first:last]


def fix(root=ROOT):
    changed = []
    for path, name, home in copies(root):
        if text(path, name) != text(home, name):
            first, last = blocks(path.read_text())[name]
            lines = path.read_text().splitlines()
            path.write_text("\n".join(lines[:first] + text(home, name) + lines[last:]) + "\n")
            changed.append(f"{path.name}: {name}")
    return changed


def test_copies_equal_their_homes():
    different = [f"{path.name}: {name} differs from {home.name}" for path, name, home in copies() if text(path, name) != text(home, name)]
    assert not different, "\n".join(different + ["run: python tests/test_copies.py --fix"])


def test_a_changed_or_shortened_copy_is_found_and_fixed(tmp_path):
    """Planted in a copy: another letter; the last line missing; a mark above nothing."""
    home = "def f(x):\n    y = x\n    return y\n\n\n@deco\nclass A:\n    a = 1\n\n    b = 2\n"
    (tmp_path / "home.py").write_text(home)
    for damaged in (home.replace("y = x", "y = -x"), home.replace("\n\n    b = 2", "")):
        body = damaged.replace("def f", "# Copied from home.py\ndef f").replace("@deco", "# Copied from home.py\n@deco")
        (tmp_path / "copy.py").write_text("import os\n\n\n" + body)
        assert len(copies(tmp_path)) == 2
        assert len(fix(tmp_path)) == 1 and fix(tmp_path) == []
        assert all(text(path, name) == text(source, name) for path, name, source in copies(tmp_path))
    (tmp_path / "copy.py").write_text("# Copied from home.py\n\n\ndef f(): pass\n")
    with pytest.raises(ValueError, match="no class or def right below"):
        copies(tmp_path)


if __name__ == "__main__":
    for line in fix() if "--fix" in sys.argv else [f"{path.name}: {name} of {home.name}" for path, name, home in copies()]:
        print(line)
