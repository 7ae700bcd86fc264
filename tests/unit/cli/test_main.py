"""The command line as a whole: help, versions, exit statuses, and what may be missing."""

import re
import subprocess
import sys

import pytest

import flexdecode

COMMANDS = ["bench", "explain", "doctor", "compile", "cache", "cache list", "cache size", "cache clear"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example(run, command):
    done = run(*command.split(), "--help")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() in ("Example:", "Examples:"))
    examples = [line.strip() for line in lines[start + 1 :]]
    assert examples and all(line.startswith(f"flexdecode {command}".rstrip()) for line in examples)
    assert run(*command.split(), "-h").out == done.out


def test_without_a_command_it_helps(run):
    assert run() == run("--help")


def test_the_commands_are_those_of_the_help(run):
    section = run().out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"^  (\w+)", section, re.MULTILINE)) == {name.split()[0] for name in COMMANDS}


def test_version(run):
    assert run("--version") == (0, f"flexdecode {flexdecode.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob'. (`flexdecode --help` has an example)"),
        (["--frob"], "No such option: --frob (`flexdecode --help` has an example)"),
        (["cache"], "Missing command. (`flexdecode cache --help` has an example)"),
        (["cache", "frob"], "No such command 'frob'. (`flexdecode cache --help` has an example)"),
        (["explain"], "Missing option '--shape'. (`flexdecode explain --help` has an example)"),
        (["compile"], "Missing option '--shape' / '--shapes'. (`flexdecode compile --help` has an example)"),
        (["doctor", "--frob"], "No such option: --frob (`flexdecode doctor --help` has an example)"),
    ],
)
def test_command_lines_that_are_none(run, arguments, message):
    assert run(*arguments).mistake() == message


def test_the_module_and_the_function_are_the_same():
    command = [sys.executable, "-m", "flexdecode"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"flexdecode {flexdecode.__version__}\n", "")
    done = subprocess.run([*command, "explain", "no.py:mod", "--shape", "B=1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "flexdecode: no.py: there is no such file\n")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_what_is_missing_is_named(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from flexdecode.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flexdecode: the command line needs typer and rich: pip install 'flexdecode[cli]'\n"


def test_ctrl_c(run, monkeypatch):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(flexdecode, "explain", stop)
    done = run("explain", "--shape", "B=1,Hq=1,Hkv=1,N=16,D=16")
    assert done.status == 130 and "Traceback" not in done.err


def test_a_bug_of_ours_is_no_mistake_of_the_user(run, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("a bug")

    monkeypatch.setattr(flexdecode, "explain", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("explain", "--shape", "B=1,Hq=1,Hkv=1,N=16,D=16")
