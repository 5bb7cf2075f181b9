"""The inventory: typed, edited in place, and refusing what it cannot mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.collect import locked
from dispatch.following.cursor import Reading
from dispatch.hosts.inventory import Host, Inventory, PinnedKey
from dispatch.places import Places
from dispatch.records import remember
from dispatch.transport.open import open_transport
from latentforge.errors import RefusedError

KEY_TOML = 'type = "ssh-ed25519"\nsha256 = "SHA256:' + "Q" * 43 + '"\ndate = "2026-11-09"\n'
KEY = PinnedKey(type="ssh-ed25519", sha256="SHA256:" + "Q" * 43, date="2026-11-09")
WORD = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="'`\";&<>|(){}@/:[]-"),
    min_size=1,
    max_size=30,
)
PATH = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30).map(lambda text: "/" + text)


def write(laptop: Any, text: str) -> Inventory:
    laptop.places.hosts_file.parent.mkdir(parents=True, exist_ok=True)
    laptop.places.hosts_file.write_text(text)
    return Inventory.load(laptop.places)


def test_an_absent_file_knows_local_alone(laptop: Any) -> None:
    assert Inventory.load(laptop.places).names() == ["local"]


def test_putting_a_host_keeps_comments_order_and_other_hosts(laptop: Any) -> None:
    text = '# mine\ndefault = "a"\n\n[hosts.a]  # first\naddress = "a.lan"\n# about b\n[hosts.b]\naddress = "b.lan"\n'
    inventory = write(laptop, text)
    inventory.put(Host(name="a", address="new.lan", port=2222, keys=(KEY,)))
    after = laptop.places.hosts_file.read_text()
    said = [line for line in after.splitlines() if line.startswith(("#", "[", "default"))]
    assert said == ["# mine", 'default = "a"', "[hosts.a]  # first", "# about b", "[hosts.b]"]
    again = Inventory.load(laptop.places)
    assert again.get("a").address == "new.lan"
    assert again.get("a").keys == (KEY,)
    assert again.get("b").address == "b.lan"
    assert again.default == "a"


@settings(max_examples=30)
@given(
    address=WORD,
    user=st.none() | WORD,
    root=st.none() | PATH,
    port=st.none() | st.integers(1, 65535),
    gb10=st.booleans(),
)
def test_any_host_that_is_written_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    address: str,
    user: str | None,
    root: str | None,
    port: int | None,
    gb10: bool,
) -> None:
    folder = tmp_path_factory.mktemp("inventory")
    places = Places(folder, folder, folder)
    host = Host(name="x.y-z", address=address, user=user, root=root, port=port, gb10=gb10, keys=(KEY,))
    Inventory.load(places).put(host)
    assert Inventory.load(places).get("x.y-z") == host
    Inventory.load(places).put(host.model_copy(update={"lock": "gb10"}))
    assert Inventory.load(places).get("x.y-z").lock == "gb10"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[hosts.a]\nadress = "x"\n', ["adress", "did you mean 'address'?"]),
        ("[hosts.a]\nport = 70000\n", ["hosts.a.port", "70000"]),
        ("[hosts.a]\nport = 0\n", ["hosts.a.port = 0"]),
        ('[hosts.a]\nport = "22"\n', ["hosts.a.port = '22'", "integer"]),
        ("[hosts.a]\nport = true\n", ["hosts.a.port = True", "integer"]),
        ('[hosts.a]\ngb10 = "yes"\n', ["hosts.a.gb10 = 'yes'", "boolean"]),
        ("[hosts.a]\nkill_below_gib = inf\n", ["hosts.a.kill_below_gib = inf"]),
        ("[hosts.a]\nwarn_below_gib = 1\nkill_below_gib = 8\n", ["hosts.a: warn_below_gib is less"]),
        ('[hosts.a]\nuser = "a b"\n', ["hosts.a.user = 'a b': not a login name"]),
        ('[hosts.a]\nuser = "-oProxyCommand=x"\n', ["not a login name"]),
        ('[hosts.a]\nuser = ""\n', ["hosts.a.user = ''"]),
        ('[hosts.a]\naddress = "-oProxyCommand=x"\n', ["hosts.a.address", "not a host name"]),
        ('[hosts.a]\naddress = "me@a.lan"\n', ["goes into `user`"]),
        ('[hosts.a]\naddress = "a.lan:22"\n', ["goes into `port`"]),
        ('[hosts.a]\naddress = "[::1]:22"\n', ["goes into `port`"]),
        ('[hosts.a]\naddress = "a\\nb"\n', ["not a host name"]),
        ('[hosts.a]\nroot = "runs"\n', ["hosts.a.root = 'runs'", "begin it with / or ~/"]),
        ('[hosts.a]\nroot = "$HOME/runs"\n', ["begin it with / or ~/"]),
        ('[hosts.a]\nidentity = "id_work"\n', ["hosts.a.identity = 'id_work'"]),
        ('[hosts.a]\npython = "~/venv/bin/python"\n', ["hosts.a.python", "path from / on"]),
        ('[hosts.a]\nname = "b"\n', ["hosts.a.name = 'b'"]),
        ("hosts = 3\n", ["hosts = 3 is not a table"]),
        ('[hosts]\na = "a.lan"\n', ["hosts.a = 'a.lan' is not a table"]),
        ("[[hosts.a]]\n", ["hosts.a", "is not a table"]),
        ('[hosts.local]\naddress = "x"\n', ["built in"]),
        ('default = "b"\n[hosts.a]\n', ["default = 'b'"]),
        ('default = ["a"]\n[hosts.a]\n', ["default = ['a']"]),
        ('[hosts."a b"]\n', ["'a b'"]),
        ('[hosts."-a"]\n', ["hosts.toml", "'-a' cannot name a host"]),
        ("default =\n[hosts.a]\n", ["hosts.toml is not TOML", "line 1"]),
        ("[hosts.a]\n[hosts.a]\n", ["hosts.toml is not TOML", "twice", "line 2"]),
        ("[machines.a]\n", ["machines"]),
        ("[host.a]\n", ["unknown key 'host'", "did you mean 'hosts'?"]),
        ('[hosts.a]\n[lanes]\nn = ["b"]\n', ["lanes.n names 'b', which is not one of its hosts"]),
        ('[hosts.a]\n[lanes]\nn = ["m"]\nm = ["n"]\n', ["lanes.n names the lane 'm'", "a list of hosts"]),
        ('[hosts.a]\n[lanes]\n"a,b" = ["a"]\n', ["'a,b' cannot name a lane"]),
    ],
)
def test_a_wrong_inventory_is_refused_with_the_field(laptop: Any, text: str, words: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        write(laptop, text)
    told = f"{refused.value} {refused.value.next}"
    assert "hosts.toml" in told
    for word in words:
        assert word in told


def test_an_inventory_that_cannot_be_read_is_told_by_its_path(laptop: Any) -> None:
    laptop.places.hosts_file.mkdir(parents=True)
    with pytest.raises(RefusedError, match=r"hosts\.toml cannot be read: Is a directory"):
        Inventory.load(laptop.places)


@pytest.mark.parametrize(
    ("written", "meant"), [("[::1]", "::1"), ("fe80::1%eth0", "fe80::1%eth0"), ("bücher.lan", "bücher.lan")]
)
def test_addresses_of_any_family_and_script_are_taken(laptop: Any, written: str, meant: str) -> None:
    assert write(laptop, f'\ufeff[hosts.a]\naddress = "{written}"\n').get("a").address == meant


@pytest.mark.parametrize(
    "text", ['hosts.a.address = "a.lan"\n', "[hosts.a]\n[[hosts.a.keys]]\n" + KEY_TOML, "[hosts]\na = { port = 1 }\n"]
)
def test_a_table_in_a_form_that_cannot_be_changed_safely_is_left_alone(laptop: Any, text: str) -> None:
    inventory = write(laptop, text)
    with pytest.raises(RefusedError, match="cannot be changed safely"):
        inventory.put(Host(name="a", address="b.lan", keys=(KEY,)))
    assert laptop.places.hosts_file.read_text() == text


def test_what_another_command_wrote_meanwhile_is_kept(laptop: Any) -> None:
    first, second = write(laptop, ""), Inventory.load(laptop.places)
    first.put(Host(name="a", address="a.lan"))
    second.put(Host(name="b", address="b.lan"))
    assert Inventory.load(laptop.places).names() == ["local", "a", "b"]


def test_a_hosts_file_that_is_a_link_stays_one_and_keeps_its_mode(laptop: Any, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("# mine\n")
    real.chmod(0o600)
    laptop.places.hosts_file.parent.mkdir(parents=True)
    laptop.places.hosts_file.symlink_to(real)
    Inventory.load(laptop.places).put(Host(name="a", address="a.lan"))
    assert laptop.places.hosts_file.is_symlink()
    assert real.read_text().startswith("# mine\n\n[hosts.a]\n")
    assert real.stat().st_mode & 0o777 == 0o600


def test_flag_then_gx10_host_then_default_then_local(laptop: Any) -> None:
    inventory = write(laptop, 'default = "a"\n[hosts.a]\n[hosts.b]\n[hosts.c]\n')
    assert inventory.choose("c", {"GX10_HOST": "b"}).name == "c"
    assert inventory.choose(None, {"GX10_HOST": "b"}).name == "b"
    assert inventory.choose(None, {}).name == "a"
    with pytest.raises(RefusedError, match="--host '' names no host"):
        inventory.choose("", {"GX10_HOST": "b"})
    assert Inventory(Path("x"), {}).choose(None, {}).name == "local"


def test_gx10_user_and_repo_path_replace_user_and_root(laptop: Any) -> None:
    inventory = write(laptop, '[hosts.a]\nuser = "old"\nroot = "/old"\n')
    host = inventory.choose("a", {"GX10_USER": "new", "GX10_REPO_PATH": "/new"})
    assert (host.user, host.root) == ("new", "/new")
    local = inventory.choose("local", {"GX10_USER": "new", "GX10_REPO_PATH": "/new"})
    assert (local.user, local.root) == (None, "/new")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"GX10_HOST": "aa"}, ["GX10_HOST='aa' (environment variable)", "not enrolled", "did you mean 'a'?"]),
        ({"GX10_HOST": "a", "GX10_USER": "-oProxyCommand=x"}, ["GX10_USER='-oProxyCommand=x'", "not a login name"]),
        ({"GX10_HOST": "a", "GX10_USER": "me you"}, ["GX10_USER='me you'"]),
        ({"GX10_HOST": "a", "GX10_REPO_PATH": "runs"}, ["GX10_REPO_PATH='runs'", "begin it with / or ~/"]),
        ({"GX10_REPO_PATH": "./here"}, ["GX10_REPO_PATH='./here'"]),
    ],
)
def test_a_wrong_value_in_the_environment_is_refused_by_its_name(
    laptop: Any, env: dict[str, str], words: list[str]
) -> None:
    inventory = write(laptop, "[hosts.a]\n")
    with pytest.raises(RefusedError) as refused:
        inventory.choose(None, env)
    for word in words:
        assert word in f"{refused.value} {refused.value.next}"


def test_the_laptop_s_state_is_its_owner_s_alone_whatever_the_umask_and_stays_fit_for_host_local(
    laptop: Any, tmp_path: Path
) -> None:
    earlier = os.umask(0o002)  # what many systems give a user with a group of their own
    try:
        remember(laptop.places, Host(name="box", address="box"), ["distill-" + "a" * 20], recipe="tiny", plan="p")
        Reading(laptop.places.followed("box", "distill-" + "a" * 20)).take({}, [], b"")
        with locked(laptop.places, "distill-" + "a" * 20):
            pass
    finally:
        os.umask(earlier)
    state = laptop.home / "state"
    folders = [path for path in [state, *state.rglob("*")] if path.is_dir()]
    assert len(folders) == 8
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    transport = open_transport(Host(name="local"), laptop.places)
    assert transport.call("install", {}).result["path"].startswith(str(state / "latentforge" / "agent"))
