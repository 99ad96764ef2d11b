"""Keys: whoever holds one gets in, whoever almost holds one does not."""

from __future__ import annotations

import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from core.errors import AuthenticationFailed, Conflict, InvalidInput, NotFound
from core.keys import authenticate, create_key, create_team, ensure_admin_key, find_team, revoke_key
from core.models import ApiKey, Team


@pytest.fixture
def team(database):
    with database.writing() as session:
        made = create_team(session, "blue")
        session.commit()
        return made


@pytest.fixture
def key(database, team):
    """The row's id and the key's text."""
    with database.writing() as session:
        row, text = create_key(session, team, name="laptop", is_admin=False)
        session.commit()
        return row.id, text


def enter(database, text):
    with database.reading() as session:
        return authenticate(session, text)


def test_a_key_opens_its_team(database, team, key):
    caller = enter(database, key[1])
    assert (caller.team_id, caller.team_name, caller.is_admin) == (team.id, "blue", False)


def test_a_key_can_be_read_nowhere_in_the_database(database, key):
    secret = key[1].split("_")[2]
    with database.reading() as session:
        row = session.scalars(select(ApiKey)).one()
    assert all(secret not in str(value) for value in vars(row).values())


def test_two_keys_of_a_team_differ_and_both_open_it(database, team):
    with database.writing() as session:
        texts = [create_key(session, team, name="same", is_admin=False)[1] for _ in range(2)]
        session.commit()
    assert len(set(texts)) == 2
    assert {enter(database, text).team_id for text in texts} == {team.id}


def test_a_revoked_key_is_refused_and_cannot_be_revoked_twice(database, key):
    with database.writing() as session:
        revoke_key(session, key[0])
        session.commit()
    with pytest.raises(AuthenticationFailed):
        enter(database, key[1])
    with database.writing() as session, pytest.raises(NotFound):
        revoke_key(session, key[0])


def test_a_right_id_with_a_wrong_secret_is_refused_in_the_same_words(database, key):
    _, other = make_other(database)
    prefix, identity, _, _ = key[1].split("_")
    forged = rebuilt(prefix, identity, other.split("_")[2])
    said = []
    for text in (forged, rebuilt(prefix, "0" * 16, "0" * 64), "nonsense"):
        with pytest.raises(AuthenticationFailed) as caught:
            enter(database, text)
        said.append((caught.value.message, caught.value.code))
    assert len(set(said)) == 1


def make_other(database):
    with database.writing() as session:
        made = create_key(session, create_team(session, "red"), name="x", is_admin=True)
        session.commit()
        return made


def rebuilt(prefix, identity, secret):
    """A key with a right checksum, by the format that the module states."""
    import zlib

    body = f"{prefix}_{identity}_{secret}"
    return f"{body}_{zlib.crc32(body.encode()):08x}"


@given(text=st.text(max_size=120))
def test_any_other_text_is_refused_without_a_look_at_the_database(text):
    with pytest.raises(AuthenticationFailed):
        authenticate(None, text)  # type: ignore[arg-type]


@given(data=st.data())
def test_one_letter_changed_is_noticed_by_the_checksum(data):
    text = rebuilt("sft", "0123456789abcdef", "ab" * 32)
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("0123456789abcdefg_").filter(lambda one: one != text[place]))
    with pytest.raises(AuthenticationFailed):
        authenticate(None, text[:place] + letter + text[place + 1 :])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "Blue", "a b", "a:b", "a/b", "ä", "x" * 33, "a\n", "\0"])
def test_a_team_name_that_a_model_id_could_not_carry_is_refused(database, name):
    with database.writing() as session, pytest.raises(InvalidInput):
        create_team(session, name)


def test_a_team_name_is_given_once(database, team):
    with database.writing() as session, pytest.raises(Conflict):
        create_team(session, "blue")


def test_an_unknown_team_is_named_with_the_remedy(database):
    with database.reading() as session, pytest.raises(NotFound, match="shadowft teams create green"):
        find_team(session, "green")


def test_the_first_start_writes_an_admin_key_that_only_its_owner_reads(database, settings):
    path = ensure_admin_key(database, settings)
    assert path == settings.admin_key_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert enter(database, path.read_text().strip()).is_admin
    assert ensure_admin_key(database, settings) is None


def test_several_first_starts_at_once_make_one_team_and_one_key(database, settings):
    made, failed, together = [], [], threading.Barrier(6)

    def start():
        together.wait()
        try:
            made.append(ensure_admin_key(database, settings))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [path for path in made if path] == [settings.admin_key_file]
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Team)) == 1
        assert session.scalar(select(func.count()).select_from(ApiKey)) == 1
