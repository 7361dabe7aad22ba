import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.real
@pytest.mark.slow
def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    names = {}  # a block goes on from the one before
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "out" / "gateskip.json").is_file()


def test_commands_in_the_readme_exist():
    from typer.main import get_command

    from gateskip_compress.cli import app

    named = set(re.findall(r"^gateskip (\w+)", README.read_text(), flags=re.MULTILINE))
    assert named == set(get_command(app).commands)
