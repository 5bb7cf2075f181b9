"""A contract file that says something the project would not read is refused, with the line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.contracts import load_contracts
from latentforge.contracts.document import parse_document
from latentforge.errors import RefusedError

GOOD = """\
contract: planted
version: 1
title: a planted contract
description: >
  What it is about.
references: ["a paper, section 2"]
depends_on: []
supersedes: []
scope: {arch: any, device: any, profile: any}
equations:
  - {id: one, formula: "a = b", source: "a paper"}
falsifiers:
  - id: F-PLANTED-ONE-001
    statement: one is one
    prediction: difference 0
    check: latentforge.planted:check
    with: {}
    control: {name: two, with: {mutant: two}}
    if_fails: arithmetic is broken
"""


def write(folder: Path, text: str, name: str = "planted") -> Path:
    (folder / f"{name}.yaml").write_text(text)
    return folder


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RefusedError) as caught:
        load_contracts(write(folder, text))
    return str(caught.value)


def test_a_good_file_is_read_whole(tmp_path: Path) -> None:
    (contract,) = load_contracts(write(tmp_path, GOOD))
    (falsifier,) = contract.falsifiers
    assert falsifier.check == "latentforge.planted:check"
    assert falsifier.control_arguments == {"mutant": "two"}
    assert contract.equations[0].formula == "a = b"


# One misspelling of each key at each level: every one of them must be caught, with its line and the right key.
MISSPELT = [
    ("contract:", "contrct:", 1, "contract"),
    ("version:", "verson:", 2, "version"),
    ("title:", "titel:", 3, "title"),
    ("description:", "desciption:", 4, "description"),
    ("references:", "refrences:", 6, "references"),
    ("depends_on:", "depends-on:", 7, "depends_on"),
    ("supersedes:", "superseds:", 8, "supersedes"),
    ("scope:", "scop:", 9, "scope"),
    ("arch:", "arc:", 9, "arch"),
    ("device:", "devise:", 9, "device"),
    ("profile:", "profil:", 9, "profile"),
    ("equations:", "equation:", 10, "equations"),
    ("formula:", "fromula:", 11, "formula"),
    ("source:", "sources:", 11, "source"),
    ("falsifiers:", "falsifier:", 12, "falsifiers"),
    ("statement:", "statment:", 14, "statement"),
    ("prediction:", "perdiction:", 15, "prediction"),
    ("check:", "chek:", 16, "check"),
    ("    with:", "    wiht:", 17, "with"),
    ("control:", "controll:", 18, "control"),
    ("name:", "nmae:", 18, "name"),
    ("if_fails:", "if_fail:", 19, "if_fails"),
]


@pytest.mark.parametrize(("right", "wrong", "line", "suggested"), MISSPELT, ids=[wrong for _, wrong, _, _ in MISSPELT])
def test_a_misspelt_key_is_refused_with_line_and_nearest_key(
    tmp_path: Path, right: str, wrong: str, line: int, suggested: str
) -> None:
    said = refusal(tmp_path, GOOD.replace(right, wrong, 1))
    assert f"planted.yaml:{line}: unknown key {wrong.strip().rstrip(':')!r}" in said
    assert f"did you mean {suggested!r}?" in said


@pytest.mark.parametrize("line", [1, 2, 3, 6, 9, 12])
def test_a_key_written_twice_is_refused_with_both_lines(tmp_path: Path, line: int) -> None:
    lines = GOOD.splitlines(keepends=True)
    if line == 12:
        lines.append("falsifiers: []\n")
        second = len(lines)
    else:
        lines.insert(line, lines[line - 1])
        second = line + 1
    assert f"planted.yaml:{second}: key " in (said := refusal(tmp_path, "".join(lines)))
    assert f"is written twice (first on line {line})" in said


@pytest.mark.parametrize(
    "missing",
    ["version", "title", "references", "falsifiers", "    prediction", "    check", "    control", "    if_fails"],
)
def test_a_missing_key_is_refused(tmp_path: Path, missing: str) -> None:
    lines = GOOD.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"{missing}:")]
    if missing == "falsifiers":
        kept = [line for line in kept if not line.startswith(("  - id: F-", "    "))]
    assert f"key {missing.strip()!r} is missing" in refusal(tmp_path, "".join(kept))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("version: 1", "version: one", "planted.yaml:2: version = 'one'"),
        ("version: 1", "version: 0", "planted.yaml:2: version = 0"),
        ('references: ["a paper, section 2"]', "references: []", "planted.yaml:6: references"),
        ("F-PLANTED-ONE-001", "F-PLANTED-ONE", "planted.yaml:13: falsifiers[0].id = 'F-PLANTED-ONE'"),
        ("latentforge.planted:check", "planted check", "planted.yaml:16: falsifiers[0].check = 'planted check'"),
        ("latentforge.planted:check", "os:system", "planted.yaml:16: falsifiers[0].check = 'os:system'"),
        ("with: {mutant: two}", "with: {}", "planted.yaml:18: falsifiers[0].control.with"),
        ("    with: {}", "    with: {mutant: two}", "nothing is planted"),
        ("device: any", "device: tpu", "planted.yaml:9: scope.device = 'tpu'"),
        ("contract: planted", "contract: other", "planted.yaml:1: contract 'other' stands in planted.yaml"),
        ("depends_on: []", "depends_on: [absent]", "planted.yaml:7: depends_on 'absent': no such contract"),
        ("depends_on: []", "depends_on: [plant]", "planted.yaml:7: depends_on 'plant': no such contract"),
        (
            "supersedes: []",
            "supersedes: [F-PLANTED-TWO-001]",
            "planted.yaml:8: supersedes F-PLANTED-TWO-001: no",
        ),
        ("depends_on: []", "depends_on: [planted]", "names this contract itself"),
        ("supersedes: []", "supersedes: [F-PLANTED-ONE-001]", "own falsifier F-PLANTED-ONE-001"),
        ("title: a planted contract", "title: &a x", "planted.yaml:3: anchors"),
        ("title: a planted contract", "title: [", "not YAML"),
        ("title: a planted contract", "1: x", "planted.yaml:3: key '1' is not text"),
        ("statement: one is one", "statement: '  '", "planted.yaml:14: falsifiers[0].statement"),
        (
            "title: a planted contract",
            "title: !!python/object/apply:os.system [x]",
            "planted.yaml:3: tags are not used",
        ),
        ("scope: {arch: any", "scope: !!set {arch: any", "planted.yaml:9: tags are not used"),
        ("    with: {}", "    with: !mine {x: 1}", "planted.yaml:17: tags are not used"),
        ("    with: {}", "    with: {x: !!binary /w==}", "planted.yaml:17: tags are not used"),
        ("    with: {}", "    with: {<<: {a: 1}}", "planted.yaml:17: merges ('<<') are not used"),
        ("    with: {}", "    with: {x: {y: [{z: 1, z: 2}]}}", "planted.yaml:17: key 'z' is written twice"),
        ("    with: {}", "    with: {~: 1}", "planted.yaml:17: key '~' is not text"),
        ("    with: {}", "    with: {yes: 1}", "planted.yaml:17: key 'yes' is not text"),
        ("    with: {}", "    with: {2020-01-01: 1}", "planted.yaml:17: key '2020-01-01' is not text"),
        ("    with: {}", "    with: {[a]: 1}", "planted.yaml:17: a key is not text but a list or a mapping"),
        ("    with: {}", "    with: {x: 2020-01-01}", "planted.yaml:17: YAML reads '2020-01-01' as timestamp"),
        ("    with: {}", "    with: {x: 010}", "planted.yaml:17: YAML reads '010' as int"),
        ("    with: {}", "    with: {x: 1:30}", "planted.yaml:17: YAML reads '1:30' as int"),
        ("    with: {}", "    with: {x: 0x10}", "planted.yaml:17: YAML reads '0x10' as int"),
        ("    with: {}", "    with: {x: off}", "planted.yaml:17: YAML reads 'off' as bool: write it as true or false"),
        ("    with: {}", "    with: {x: .nan}", "planted.yaml:17: YAML reads '.nan' as float"),
        ("    with: {}", "    with: {x: 1" + "0" * 5000 + "}", "is larger than any number that is read here"),
        ("    with: {}", "    with: {x: 1.0e+999}", "is larger than any number that is read here"),
        (
            "    with: {}",
            "    with: {x: " + "[" * 40 + "]" * 40 + "}",
            "planted.yaml:17: more than 32 lists and mappings",
        ),
        ("title: a planted contract", 'title: "a\\e[2K"', "planted.yaml:3: 'a\\x1b[2K' holds the character '\\x1b'"),
        ("title: a planted contract", 'title: "\\ud800"', "planted.yaml:3: '\\ud800' holds the character"),
        ("title: a planted contract", "title: a\0b", "planted.yaml:3: not YAML: unacceptable character 0"),
        ("version: 1", "version:\t1", "planted.yaml:2: not YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    assert said in refusal(tmp_path, GOOD.replace(right, wrong, 1))


def test_all_misspelt_keys_are_reported_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD.replace("title:", "titel:").replace("if_fails:", "if_fail:"))
    assert "planted.yaml:3:" in said
    assert "planted.yaml:19:" in said


def test_one_falsifier_id_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, GOOD.replace("contract: planted", "contract: second"), "second")
    with pytest.raises(
        RefusedError, match=r"second.yaml:13: falsifier F-PLANTED-ONE-001 is already defined in .*planted"
    ):
        load_contracts(tmp_path)


def several(folder: Path, **changes: tuple[str, str]) -> Path:
    """One contract for each name, with falsifier ``F-<NAME>-001``, and one replacement in its text."""
    for name, (right, wrong) in changes.items():
        text = GOOD.replace("contract: planted", f"contract: {name}").replace("F-PLANTED-ONE", f"F-{name.upper()}")
        assert right in text
        write(folder, text.replace(right, wrong), name)
    return folder


def test_contracts_that_depend_on_each_other_are_refused_with_the_circle(tmp_path: Path) -> None:
    several(
        tmp_path,
        a=("depends_on: []", "depends_on: [b]"),
        b=("depends_on: []", "depends_on: [c]"),
        c=("depends_on: []", "depends_on: [d, a]"),
        d=("", ""),
    )
    with pytest.raises(RefusedError, match=r"c.yaml:7: contracts depend on each other in a circle: c → a → b → c"):
        load_contracts(tmp_path)


def test_a_claim_has_one_successor(tmp_path: Path) -> None:
    retires = ("supersedes: []", "supersedes: [F-OLD-001]")
    several(tmp_path, old=("", ""), first=retires, second=retires)
    with pytest.raises(RefusedError, match=r"second.yaml:8: F-OLD-001 is already superseded by first"):
        load_contracts(tmp_path)


def test_contracts_that_retire_each_other_are_refused(tmp_path: Path) -> None:
    several(
        tmp_path,
        a=("supersedes: []", "supersedes: [F-B-001]"),
        b=("supersedes: []", "supersedes: [F-A-001]"),
    )
    with pytest.raises(RefusedError, match=r"b.yaml:8: contracts supersede each other in a circle: b → a → b"):
        load_contracts(tmp_path)


def test_a_successor_can_have_a_successor(tmp_path: Path) -> None:
    several(
        tmp_path,
        old=("", ""),
        newer=("supersedes: []", "supersedes: [F-OLD-001]"),
        newest=("supersedes: []", "supersedes: [F-NEWER-001]"),
    )
    contracts = load_contracts(tmp_path)
    found = {falsifier.id: contracts.superseded_by(falsifier.id) for _, falsifier in contracts.falsifiers()}
    assert found == {"F-OLD-001": "newer", "F-NEWER-001": "newest", "F-NEWEST-001": None}


def test_dependencies_come_before_what_depends_on_them(tmp_path: Path) -> None:
    write(tmp_path, GOOD.replace("depends_on: []", "depends_on: [zebra]"))
    write(tmp_path, GOOD.replace("contract: planted", "contract: zebra").replace("ONE-001", "TWO-001"), "zebra")
    assert [contract.contract for contract in load_contracts(tmp_path)] == ["zebra", "planted"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "planted.yaml:1: more than 32 lists and mappings"),
        ("{a: " * 5_000, "planted.yaml:1: more than 32 lists and mappings"),
        ("- " * 5_000 + "a", "planted.yaml:1: more than 32 lists and mappings"),
        ("contract: [" + "a," * 5_000_000 + "]", "planted.yaml:1: 10000012 characters are more than"),
        ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(30)), "planted.yaml:1: anchors"),
        ("contract: &a [*a]\n", "planted.yaml:1: anchors"),
        (GOOD + "---\n" + GOOD, "planted.yaml:20: not YAML: but found another document"),
        ("", "planted.yaml:1: the file is empty"),
        ("- a\n", "planted.yaml:1: a contract is a mapping of keys"),
    ],
    ids=["lists", "mappings", "items", "10 MB", "laughs", "itself", "two", "empty", "a list"],
)
def test_a_file_that_is_no_contract_at_all_is_refused_before_it_is_built(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_what_is_no_file_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RefusedError) as caught:
        load_contracts(tmp_path)
    for name in ("folder", "link", "pipe"):
        assert f"{name}.yaml:1: is no file that can be read" in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no contracts"):
        load_contracts(tmp_path)


def test_the_projects_own_contracts_load() -> None:
    assert any(contract.contract == "evidence" for contract in load_contracts())


@given(st.text(max_size=200) | st.text(alphabet="abc:-[]{}#&*!|>%@'\"0123456789.\n _<", max_size=80))
def test_no_text_makes_the_parser_fail_other_than_by_a_refusal_with_a_line(text: str) -> None:
    refused = None
    try:
        parse_document(text, "any.yaml")
    except RefusedError as error:
        refused = str(error)
    assert refused is None or re.match(r"any\.yaml:[0-9]+: ", refused)


def test_an_install_without_a_checkout_reads_the_contracts_that_the_wheel_carries(tmp_path: Path) -> None:
    import latentforge

    package = Path(latentforge.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(package, tmp_path / "latentforge", ignore=ignored)
    shutil.copytree(package.parent / "contracts", tmp_path / "latentforge" / "_data" / "contracts")
    # -S: without site-packages' .pth files, which would lead back to the checkout.
    found = subprocess.run(
        [
            sys.executable, "-I", "-S", "-c",
            f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {sysconfig.get_path('purelib')!r}]\n"
            "from latentforge.contracts import contracts_folder, load_contracts\n"
            "print(contracts_folder(), sum(1 for _ in load_contracts()))",
        ],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert found[0] == str(tmp_path / "latentforge" / "_data" / "contracts")
    assert int(found[1]) == sum(1 for _ in load_contracts())
