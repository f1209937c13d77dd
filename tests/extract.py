"""A class or function of a file with all it needs, as a file of its own, on standard output.

    python tests/extract.py var.py VAR MultiScaleQuantizer > var_only.py

What a name needs is found in the source: the top-level names that it, and what it needs, speak of, and Config and PRESETS where
something takes a config. Copies declared with `# Copied from` are blocks of their own file, so nothing is looked for elsewhere.
Without a name: what goes with each of the file's classes.
"""
import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def names_of(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def needed(source, names):
    """-> the top-level statements that `names` need, in the file's order. Raises KeyError for a name that is not there."""
    body = ast.parse(source).body
    home = {name: node for node in body for name in names_of(node)}
    found, ahead = set(), [home[name] for name in names]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            if any(isinstance(each, ast.arg) and each.arg == "config" for each in ast.walk(node)):
                ahead += [home["Config"], home["PRESETS"]]
            ahead += [home[each.id] for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in home]
    return [node for node in body if node in found]


def extract(path, names):
    """-> source of a module that holds `names` and what they need."""
    source = path.read_text()
    lines, parts = source.splitlines(), []
    for node in needed(source, names):
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
        gap = 2 if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else 0
        parts.append("\n" * gap + "\n".join(lines[first - 1:node.end_lineno]))
    return f'"""From {path.name}: {", ".join(names)}."""\n' + "\n".join(parts) + "\n"


def travels(path):
    """-> {class: names of other classes and functions that go with it}, of the part of the file above its helpers."""
    source = path.read_text()
    paper = source[:source.index("# === Helpers")]
    found = {}
    for node in ast.parse(paper).body:
        if isinstance(node, ast.ClassDef):
            others = [name for each in needed(source, [node.name]) if each.lineno != node.lineno and isinstance(each, (ast.ClassDef, ast.FunctionDef))
                      for name in names_of(each)]
            found[node.name] = others
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", choices=sorted(path.name for path in ROOT.glob("*.py")))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.names:
        try:
            sys.stdout.write(extract(ROOT / args.file, args.names))
        except KeyError as error:
            parser.error(f"{args.file} has no {error}: without a name it lists them")
    else:
        for name, others in travels(ROOT / args.file).items():
            sys.stdout.write(f"{name}: {', '.join(others) or 'alone'}\n")
