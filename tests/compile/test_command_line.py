"""`flexdecode compile` writes kernels for a GPU that is not here."""

import pytest

import flexdecode
from flexdecode.cli import main

WORDS = ("--shape", "B=2,Hq=8,Hkv=2,N=1024,D=64", "--kv-lens", "int32", "-o")


@pytest.mark.skipif(not hasattr(flexdecode, "save_kernels"), reason="needs flexdecode.save_kernels")
def test_a_folder_of_kernels(tmp_path, capsys):
    folder = tmp_path / "kernels"
    command = ["compile", "mods:sliding_window(64)", *WORDS, str(folder), "--device"]
    for state in ("compiled", "was there"):
        assert main([*command, "H100"]) == 0
        shape, *kernels, place = capsys.readouterr().out.splitlines()
        assert shape == WORDS[1] and place == f"In {folder}"
        assert [line.split()[0] for line in kernels] == ["decode_split", "decode_combine"]
        for line in kernels:
            assert f"  {state} " in line and list(folder.rglob(line.split()[-1]))
    assert main([*command, "A100"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("flexdecode: ") and message.count("\n") == 1 and str(folder) in message
