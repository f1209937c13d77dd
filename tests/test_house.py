"""The rules of the house: self-contained files in one order, commands that stand in the README and run, honest help texts."""
import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
import types

import pytest
from conftest import FILES, ROOT

ALLOWED = {"torch", "numpy", "matplotlib", "PIL", "tqdm"}
SECTIONS = ["Config and presets", "Tokenizer", "Prior", "Sampler", "Training", "Official weights", "Helpers", "Command line"]


@pytest.fixture(params=FILES)
def file(request):
    return ROOT / f"{request.param}.py"


def test_imports_are_self_contained(file):
    """Standard library, torch, numpy, matplotlib, Pillow, tqdm; never a sibling. Planted: import scipy."""
    roots = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots <= ALLOWED | set(sys.stdlib_module_names), roots - ALLOWED - set(sys.stdlib_module_names)


def test_sections_stand_in_the_order_of_the_house(file):
    titles = re.findall(r"^# === (.+?)(?::| \(| =)", file.read_text(), re.M)
    wanted = [title for title in SECTIONS if any(found.startswith(title) for found in titles)]
    assert [next(s for s in SECTIONS if found.startswith(s)) for found in titles if any(found.startswith(s) for s in SECTIONS)] == wanted
    assert {"Config and presets", "Tokenizer", "Prior", "Sampler", "Training", "Helpers", "Command line"} <= set(wanted)


def test_lines_are_at_most_120_characters(file):
    long = [i for i, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, f"lines {long}"


def test_every_public_class_and_function_has_a_docstring(file):
    """Planted: one removed. (main's helpers under 'Command line' are no library and may go without.)"""
    source = file.read_text()
    library = source[:source.index("# === Command line")]
    bare = []
    for node in ast.parse(library).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not ast.get_docstring(node):
            if node.name not in ("build_tokenizer", "build_prior", "to_bytes"):
                bare.append(node.name)
    assert not bare


def test_every_config_field_has_a_comment_that_is_its_help(file, capsys):
    """Planted: a field without comment; a help text typed by hand."""
    module = importlib.import_module(file.stem)
    source = inspect.getsource(module.Config)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))
    assert set(comments) == {field.name for field in dataclasses.fields(module.Config)}
    with pytest.raises(SystemExit) as exit:
        module.main(["train", "--help"])
    assert exit.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, comment in comments.items():
        assert "--" + name.replace("_", "-") in shown and " ".join(comment.split()) in shown.replace("- ", "-") or " ".join(comment.split()) in shown


def test_presets_are_valid_and_demo_is_the_default(file):
    module = importlib.import_module(file.stem)
    real = {"moving_mnist"} if hasattr(module.Config, "frames") else {"mnist", "cifar10"}
    assert {"demo"} | real <= set(module.PRESETS) and module.PRESETS["demo"] == module.Config()
    for config in module.PRESETS.values():
        assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config, "config.json gives another Config: no resume"
        module.check(config)


def requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.match(r"\w+", line)[0]: line for line in lines if line and not line.startswith("#")}


def test_inline_metadata_is_in_step_with_requirements(file):
    """PEP 723: `uv run FILE.py` needs no other install. Planted: another lower bound."""
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", file.read_text())
    assert header, "no inline metadata at the top"
    text = "\n".join(line[2:] for line in header[1].splitlines())
    wanted = requirements()
    listed = re.findall(r'"([^"]+)"', text.split("dependencies")[1])
    assert 'requires-python = ">=3.10"' in text
    assert set(listed) == {wanted[name] for name in ("torch", "numpy", "matplotlib", "tqdm")} | {next(d for d in listed if d.startswith("pillow"))}


def test_requirements_are_no_more_than_the_house_allows():
    assert set(requirements()) == {"torch", "numpy", "matplotlib", "tqdm", "jupyter", "pytest"}


def readme_commands():
    """The two set-up commands of README.md: the lines of its first shell block."""
    return re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1].strip().splitlines()


def test_readme_has_two_commands_and_ci_runs_the_second():
    """Planted: another flag in .ci/run."""
    demo, tests = readme_commands()
    assert demo.endswith("python pixelcnn.py") and tests.endswith("python -m pytest")
    for command in (demo, tests):
        assert "venv" in command and "-r requirements.txt" in command
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert lines == ["set -eu", 'cd "$(dirname "$0")/.."', tests]


def test_readme_table_is_what_the_reports_say():
    """Planted: one figure typed by hand."""
    import table
    assert table.table() in (ROOT / "README.md").read_text(), "python tests/table.py prints another table"


def test_readme_says_what_is_compared():
    """Planted: one figure typed by hand; another number of lists."""
    import table
    text, lists = table.exactness()
    readme = (ROOT / "README.md").read_text()
    assert text in readme and f"{lists} released checkpoints" in readme, "python tests/table.py exactness prints another table"


def test_readme_says_what_stands_side_by_side_and_what_is_released():
    """Planted: one figure typed by hand."""
    import table
    readme = (ROOT / "README.md").read_text()
    assert table.comparison() in readme, "python tests/table.py comparison prints another table"
    assert table.weights() in readme, "python tests/table.py weights prints another table"
    for name, _, command, _ in table.WEIGHTS:
        if "--official" in command:
            importlib.import_module(table.FILE_OF.get(name, name)).parse(command.split())


@pytest.mark.parametrize("name,classes", [("var", "VAR VQVAE"), ("mar", "MAR AutoencoderKL"), ("magvit", "MagvitTransformer VideoTokenizer"),
                                          ("rqvae", "RQTransformer RQVAE"), ("maskgit", "BidirectionalTransformer VQVAE")])
def test_a_class_with_what_it_needs_stands_alone(name, classes):
    """Planted: names used in default arguments left out; decorators left behind."""
    import extract
    there, alone = importlib.import_module(name), {"__name__": "alone"}
    source = extract.extract(ROOT / f"{name}.py", classes.split())                      # with Config, since they take one
    sys.modules["alone"] = types.ModuleType("alone")                                   # dataclasses look their module up
    exec(compile(source, "alone", "exec"), alone)
    assert len(source) < 0.6 * len((ROOT / f"{name}.py").read_text())
    for each in classes.split():
        shapes = [{key: value.shape for key, value in found(config()).state_dict().items()} for found, config in ((alone[each], alone["Config"]), (vars(there)[each], there.Config))]
        assert shapes[0] == shapes[1]


def test_readme_names_only_flags_and_verbs_that_exist():
    """Every `python FILE.py ...` of README and of the docstrings parses."""
    for path in (ROOT / "README.md", *(ROOT / f"{name}.py" for name in FILES)):
        text = path.read_text() if path.suffix == ".md" else ast.get_docstring(ast.parse(path.read_text()))
        for name, words in re.findall(r"^\s*(?:torchrun \S+ \S+ |python )(\w+)\.py((?: [^ #`\n]+)*)", text, re.M):
            if name in FILES:
                words = [word for word in words.split() if not word.startswith("[")]
                if words:
                    importlib.import_module(name).parse(words)


def test_readme_snippets_run():
    """Planted: another name for `sample`."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_no_file_names_a_path_of_its_author():
    """Planted: /tmp in a report."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in [n for n in listed if n.endswith((".py", ".md", ".json", ".ipynb", ".toml", ".txt")) and not n.startswith("tests/")]:
        text = (ROOT / name).read_text()
        assert not re.search(r"/(work|root|tmp|home)/", text), name


def test_files_run_as_scripts(file):
    """`python FILE.py --help` starts with the file's own first line."""
    result = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, check=True)
    assert "usage: " in result.stdout and file.stem in result.stdout
