"""README: its code runs as it stands, and its errors are the ones that are raised."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.long
def test_code_runs_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 7
    script = "\n".join(blocks)
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_messages_in_the_table_are_in_the_code():
    table = README.split("## Errors")[1].split("## ")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.M)
    assert len(messages) >= 8
    source = " ".join(p.read_text() for p in sorted((ROOT / "jaxga").rglob("*.py")))
    words = set(re.findall(r"\w+", source))
    for message in messages:
        literal = re.sub(r"'[^']*'|\(.*?\)|\d+|=\S+|\.\.\.|WeightedSum", " ", message)
        missing = set(re.findall(r"[a-z_]{3,}", literal)) - words
        assert not missing, f"{message}: {missing}"


def test_commands_are_those_that_ci_runs():
    pattern = r"^(?:python3 -m venv|\.venv/bin/pip install -e).*$"
    commands = re.findall(pattern, README, re.M)
    test_command = commands[1].split("&&")[1].strip().removeprefix(".venv/bin/")
    assert test_command == "python -m pytest -n 2"
    assert "pytest -n 2" in (ROOT / ".ci" / "run").read_text()
