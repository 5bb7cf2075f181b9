"""The inventory: typed, edited in place, and refusing what it cannot mean."""

from __future__ import annotations

import os
import tomllib
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

KEY = PinnedKey(type="ssh-ed25519", sha256="SHA256:" + "Q" * 43, date="2026-11-09")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


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
    assert "# mine" in after
    assert "[hosts.b]" in after
    again = Inventory.load(laptop.places)
    assert again.get("a").address == "new.lan"
    assert again.get("a").keys == (KEY,)
    assert again.get("b").address == "b.lan"
    assert again.default == "a"


@settings(max_examples=30, deadline=None)
@given(
    address=TEXT,
    user=st.none() | TEXT,
    root=st.none() | TEXT,
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
        ('[hosts.local]\naddress = "x"\n', ["built in"]),
        ('default = "b"\n[hosts.a]\n', ["default = 'b'"]),
        ('[hosts."a b"]\n', ["'a b'"]),
        ("hosts = [\n", ["not TOML"]),
        ("[machines.a]\n", ["machines"]),
    ],
)
def test_a_wrong_inventory_is_refused_with_the_field(laptop: Any, text: str, words: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        write(laptop, text)
    told = f"{refused.value} {refused.value.next}"
    for word in words:
        assert word in told


def test_a_table_in_a_form_that_cannot_be_changed_safely_is_left_alone(laptop: Any) -> None:
    inventory = write(laptop, 'hosts.a.address = "a.lan"\n')
    with pytest.raises((RefusedError, tomllib.TOMLDecodeError)):
        inventory.put(Host(name="a", address="b.lan"))
    assert laptop.places.hosts_file.read_text() == 'hosts.a.address = "a.lan"\n'


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
