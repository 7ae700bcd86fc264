"""Extras are imported only when they are used, and say how they are installed."""

import subprocess
import sys


def run(code):
    """Runs code in a new process; returns what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_of_flexdecode_does_not_import_transformers():
    assert run("import sys, flexdecode; print('transformers' in sys.modules)") == "False"


def test_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
try:
    import flexdecode.integrations.transformers
except ImportError as error:
    print(error)
"""
    assert run(code) == (
        "flexdecode.integrations.transformers needs transformers 5.0 or later: pip install 'flexdecode[transformers]'"
    )
