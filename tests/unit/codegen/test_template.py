"""Splicing of hook bodies into the template, and the modules that come out. No kernel runs here."""

import ast
import builtins
import subprocess
import sys

import pytest
from support import MODS, trace_mod

from flexdecode.analysis.proven import ProvenMods
from flexdecode.codegen import template
from flexdecode.codegen.kernels import generate_module
from flexdecode.codegen.lower import Hooks
from flexdecode.codegen.template import (
    HOOK_PARAMETERS,
    generate,
    read_template,
    sources_digest,
    standalone,
    template_folder,
)


def functions_of(text):
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def body_of(text, name):
    """Source of a function's statements, without its docstring."""
    node = functions_of(text)[name]
    return "\n".join(ast.unparse(statement) for statement in node.body[1:])


def hooks(functions=(), **bodies):
    return Hooks(bodies, frozenset(functions))


# --- The files --------------------------------------------------------------------------------------------------------


def test_template_files_are_found():
    assert {path.name for path in template_folder().glob("*.py")} >= {"decode.py", "elementwise.py", "kv_descriptor.py"}
    assert read_template("decode.py") == (template_folder() / "decode.py").read_text()
    assert len(sources_digest()) == 64


def test_missing_templates(monkeypatch, tmp_path):
    monkeypatch.setattr(template, "__file__", str(tmp_path / "package" / "template.py"))
    with pytest.raises(FileNotFoundError, match="templates are missing: the installation is damaged, install it again"):
        template_folder.__wrapped__()


def test_the_digest_sees_every_file(monkeypatch, tmp_path):
    for path in template_folder().glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(template, "template_folder", lambda: tmp_path)
    before = sources_digest.__wrapped__()
    assert before == sources_digest()
    (tmp_path / "elementwise.py").write_text("# edited\n")
    assert sources_digest.__wrapped__() != before


@pytest.mark.parametrize("name", ["decode.py", "elementwise.py"])
def test_template_files_stand_alone(name):
    """Every name that a function uses is one of its own, of the file, or a builtin."""
    assert undefined_names(read_template(name)) == set()


def undefined_names(text):
    tree = ast.parse(text)
    known = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - known


def test_hooks_have_identity_bodies():
    text = read_template("decode.py")
    for name, parameters in HOOK_PARAMETERS.items():
        node = functions_of(text)[name]
        assert tuple(a.arg for a in node.args.args) == parameters
        assert ast.get_docstring(node)
    assert body_of(text, "score_mod") == "return score"
    assert body_of(text, "mask_mod") == "return live"
    for name in ("score_row", "score_fetch", "mask_row"):
        assert body_of(text, name) == "return ()"


# --- Splicing ---------------------------------------------------------------------------------------------------------


def test_no_hooks_give_the_template():
    assert generate([]) == read_template("decode.py")


def test_a_body_takes_the_place_of_another():
    text = generate([hooks(score_mod="v0 = score * 2\nreturn v0", score_row="return (b,)")])
    assert body_of(text, "score_mod") == "v0 = score * 2\nreturn v0"
    assert body_of(text, "score_row") == "return (b,)"
    assert body_of(text, "mask_mod") == "return live"
    original = read_template("decode.py")
    for name in functions_of(original).keys() - {"score_mod", "score_row"}:
        assert ast.unparse(functions_of(text)[name]) == ast.unparse(functions_of(original)[name])
    assert ast.get_docstring(functions_of(text)["score_mod"]) == ast.get_docstring(functions_of(original)["score_mod"])


def test_only_called_functions_are_copied_with_what_they_call():
    text = generate([hooks(["remainder_int"], score_mod="return remainder_int(score, b)")])
    copied = functions_of(text).keys() - functions_of(read_template("decode.py")).keys()
    assert copied == {"remainder_int", "fmod_int"}
    assert text.index("def fmod_int") < text.index("def score_mod"), "they come before the hooks"
    assert undefined_names(text) == set()


def test_both_mods_share_copied_functions():
    text = generate(
        [hooks(["tanh"], score_mod="return tanh(score)"), hooks(["tanh"], mask_mod="return live & tanh(b)")]
    )
    assert text.count("def tanh(") == 1


def test_builtins_of_triton_are_not_copied():
    assert generate([hooks(["max", "no_function_of_ours"], score_mod="return score")]).count("def max") == 0


def test_other_loads():
    text = generate([], ["kv_descriptor.py"])
    loads = functions_of(read_template("kv_descriptor.py"))
    for name, node in loads.items():
        assert ast.unparse(functions_of(text)[name]) == ast.unparse(node)
    assert "from decode import" not in text


def test_helpers_and_records_come_along():
    known = functions_of(read_template("decode.py")).keys()
    assert functions_of(generate([], ["kv_paged.py"])).keys() - known == {"_in_pool"}
    assert generate([], ["block_lists.py"]).count("Listed = namedtuple(") == 1


def test_a_template_is_a_module_that_can_be_imported():
    names = {path.stem for path in template_folder().glob("*.py")} - {"latent"}  # which needs Gluon
    subprocess.run([sys.executable, "-c", f"import {', '.join(sorted(names))}"], cwd=template_folder(), check=True)


def test_the_first_pass_over_latents_is_gluon():
    proven = ProvenMods(trace_mod(lambda s, b, h, q, k: s + 1.5 * h, "score_mod")[0], None, False)
    text = generate_module(proven, ("kv_descriptor.py", "balanced.py", "latent.py"))
    assert text.index("\ntl = _gluon_language()") > text.index("import triton.language as tl")
    assert undefined_names(text) == set()
    assert text.index("from triton.experimental import gluon") < text.index("@triton.jit")
    assert text.count("import triton\n") == 1, "imports that are there do not come again"


@pytest.mark.parametrize("name", ["no_such_hook", "attend_block"])
def test_an_unknown_hook(name):
    with pytest.raises((ValueError, KeyError), match=name):
        generate([hooks(**{name: "return 0"})])


def test_a_hook_with_other_parameters(monkeypatch):
    monkeypatch.setitem(HOOK_PARAMETERS, "score_mod", ("score", "b"))
    with pytest.raises(ValueError, match=r"the template has no hook score_mod\('score', 'b'\)"):
        generate([hooks(score_mod="return score")])


def test_a_function_that_nothing_calls(monkeypatch):
    known = template._definitions("decode.py")
    other = ast.parse("@jit\ndef row_offset(block, step, stride_n, C):\n    return 0").body
    monkeypatch.setattr(template, "_definitions", lambda name: known if name == "decode.py" else other)
    with pytest.raises(ValueError, match=r"the template has no hook row_offset\('block', 'step', 'stride_n', 'C'\)"):
        generate([], ["other.py"])


def test_a_standalone_module_says_what_it_cannot_copy(monkeypatch):
    assert undefined_names(standalone("combine.py")) == set()
    read, other = template.read_template, "from decode import read_length, nothing_of_it\n"
    monkeypatch.setattr(template, "read_template", lambda name: other if name == "other.py" else read(name))
    with pytest.raises(ValueError, match=r"other.py imports \['nothing_of_it'\], which cannot be copied"):
        standalone("other.py")


def test_loads_that_do_not_fit(monkeypatch):
    other = ast.parse("@jit\ndef load_kv(pointer):\n    '''Reads.'''\n    return 0").body
    known = template._definitions("decode.py")
    monkeypatch.setattr(template, "_definitions", lambda name: known if name == "decode.py" else other)
    with pytest.raises(ValueError, match=r"the template has no hook load_kv\('pointer',\)"):
        generate([], ["other.py"])


# --- Generated modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
@pytest.mark.parametrize("descriptors", [False, True])
def test_generated_modules_are_self_contained(family, descriptors):
    score_mod, mask_mod = (make(2, 4, 32, 2, "cpu") for make in family[1:])
    score = score_mod and trace_mod(score_mod, "score_mod")[0]
    mask = mask_mod and trace_mod(mask_mod, "mask_mod")[0]
    for q_idx_given in (False, True):
        files = ("kv_descriptor.py",) if descriptors else ()
        text = generate_module(ProvenMods(score, mask, q_idx_given), files)
        assert undefined_names(text) == set()
        assert "import flexdecode" not in text and "from flexdecode" not in text
        assert text.count("def decode_split(") == 1
        assert generate_module(ProvenMods(score, mask, q_idx_given), files) == text, "generation is deterministic"
