"""The models' cache against a Hub of the loopback that misbehaves in every way that is known of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from core.config import Settings
from core.errors import InvalidInput, ShadowError, StepFailed, Unavailable
from core.hub import mark_file, read_mark, repository_folder, snapshot_folder
from core.job_spec import ModelSource, PairSource
from tests import fake_hub
from tests.core.test_jobs import make_spec
from tests.core.test_pairs import write_model
from tests.servers import free_port, wait_until
from worker.cache_room import Wanted, fetching, make_room
from worker.inputs import holding_models
from worker.model_cache import ModelCache

TOKEN = "hf_the_secret_of_this_deployment"
#: Bytes of a model's weights: several pieces of the Hub's, and more than one network buffer.
LARGE = 4 * 4 * 131072
QUICK = {
    "retries": 3,
    "first_wait_seconds": 0.05,
    "longest_wait_seconds": 5,
    "timeout_seconds": 1,
    "stall_seconds": 1,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's folder; the downloads of this process and its children speak to it."""
    folder = tmp_path / "hub"
    with fake_hub.serve(folder) as url:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield folder


@pytest.fixture
def cache(tmp_path):
    return ModelCache(tmp_path / "cache", patience=QUICK)


def make_model(hub, name="acme/one", **trouble):
    """A model of the Hub, pinned, with the trouble that it makes."""
    folder = write_model(hub / name, hidden_size=LARGE // 16)
    (folder / "tokenizer.json").write_text(f"{{}} {name}")
    make_trouble(hub, name, **trouble)
    return pinned(hub, name)


def make_trouble(hub, name="acme/one", **trouble):
    (hub / name / fake_hub.TROUBLE).write_text(json.dumps(trouble))


def pinned(hub, name="acme/one"):
    return ModelSource(kind="hub", location=name, revision=fake_hub.Model(hub / name).commit)


def fetch(cache, source, check=lambda: None):
    return cache.fetch(source, check)


def requests(hub):
    log = hub / "requests.log"
    return log.read_text().splitlines() if log.exists() else []


def served(hub, server="cdn"):
    lines = map(json.loads, (hub / "served.jsonl").read_text().splitlines())
    return [line for line in lines if line["server"] == server]


def blobs(cache, name="acme/one"):
    return repository_folder(cache.root, name) / "blobs"


def assert_whole(hub, folder, name="acme/one"):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: path.read_bytes() for name, path in fake_hub.Model(hub / name).files().items()
    }


# --- fetched once, kept, and used from there --------------------------------------------------------------------------


def test_a_model_is_laid_out_as_the_hubs_client_does_it_and_a_second_job_asks_the_hub_nothing(hub, cache):
    source = make_model(hub)
    folder = fetch(cache, source)
    assert_whole(hub, folder)
    assert folder == snapshot_folder(cache.root, "acme/one", source.revision)
    assert all(path.is_symlink() for path in folder.iterdir())
    asked = requests(hub)
    assert fetch(cache, source) == cache.weights_at_hand(source) == folder
    assert requests(hub) == asked


@pytest.mark.slow
def test_the_small_files_come_without_the_weights_and_are_not_fetched_again_with_them(hub, cache):
    source = make_model(hub)
    small = cache.fetch_small(source, lambda: None)
    assert sorted(path.name for path in small.iterdir()) == ["config.json", "tokenizer.json"]
    assert cache.weights_at_hand(source) is None
    assert cache.fetch_small(source, lambda: None) == small
    fetch(cache, source)
    assert cache.weights_at_hand(source) == small
    fetched = [line for line in requests(hub) if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(set(fetched)) == 3


def test_of_the_weights_only_what_the_index_names_is_fetched(hub, cache):
    make_model(hub)
    folder = hub / "acme/one"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.layers.0.self_attn.q_proj.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for stray in ("model-00002-of-00002.safetensors", "other.safetensors", "tokenizer.model.safetensors"):
        (folder / stray).write_bytes(b"stray")
    fetched = fetch(cache, pinned(hub))
    assert sorted(path.name for path in fetched.iterdir()) == [
        *("config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    ]
    assert len(served(hub)) == 1


@pytest.mark.slow
def test_a_commit_with_the_same_weights_fetches_only_what_it_changed(hub, cache):
    fetch(cache, make_model(hub))
    (hub / "acme/one/tokenizer.json").write_text("another")
    assert_whole(hub, fetch(cache, pinned(hub)))
    assert len(served(hub)) == 1


def test_a_local_folder_is_itself(tmp_path, cache):
    source = ModelSource(kind="local", location=str(tmp_path))
    with cache.hold(source):
        assert (
            fetch(cache, source) == cache.fetch_small(source, lambda: None) == cache.weights_at_hand(source) == tmp_path
        )


# --- a Hub in trouble -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 429, "retry_after": 1, "first": 2},
        {"status": 503, "first": 3},
        {"cut": 100_000, "first": 3},
        pytest.param({"cut": 100_000, "no_ranges": True, "first": 2}, marks=pytest.mark.slow),
        {"hang": True, "first": 1},
        pytest.param({"silent": True, "first": 1}, marks=pytest.mark.slow),
        {"wrong_bytes": True, "first": 1},
    ],
    ids=str,
)
def test_trouble_that_passes_is_borne(hub, cache, trouble):
    assert_whole(hub, fetch(cache, make_model(hub, **trouble)))


@pytest.mark.parametrize(
    ("trouble", "kind", "code", "said"),
    [
        ({"status": 429}, Unavailable, "hub_unavailable", "429"),
        ({"status": 429, "retry_after": 3600}, Unavailable, "hub_unavailable", "wait for 3600 s"),
        pytest.param({"status": 503}, Unavailable, "hub_unavailable", "503", marks=pytest.mark.slow),
        ({"says": "<html>"}, Unavailable, "hub_unavailable", "not a Hub's"),
        ({"cut": 1}, Unavailable, "hub_unavailable", "cannot be reached"),
        ({"hang": True}, Unavailable, "hub_unavailable", "cannot be reached"),
        pytest.param({"silent": True}, Unavailable, "hub_unavailable", "cannot be reached", marks=pytest.mark.slow),
        pytest.param({"bytes_per_second": 1000}, Unavailable, "hub_unavailable", "fewer than", marks=pytest.mark.slow),
        ({"wrong_size": 10}, StepFailed, "damaged_download", "bytes where the listing says"),
        ({"wrong_bytes": True}, StepFailed, "damaged_download", "model.safetensors has the hash"),
        ({"gated": True}, InvalidInput, "gated_model", "acme/one"),
        ({"token": TOKEN}, InvalidInput, "model_not_found", "acme/one"),
    ],
    ids=str,
)
def test_trouble_that_stays_has_a_cause_of_its_own_and_leaves_no_model(hub, cache, trouble, kind, code, said):
    source = make_model(hub, **trouble)
    with pytest.raises(ShadowError) as caught:
        fetch(cache, source)
    assert (type(caught.value), caught.value.code) == (kind, code)
    assert said in caught.value.message
    assert cache.weights_at_hand(source) is None
    # At once it is asked for nothing more than a few times, and for what is the user's to mend only once.
    assert len(requests(hub)) <= 25
    if kind is InvalidInput:
        assert len([line for line in requests(hub) if "/resolve/" not in line]) == 1


def test_a_hub_that_asks_to_be_left_alone_for_an_hour_is(hub, cache):
    with pytest.raises(Unavailable):
        fetch(cache, make_model(hub, status=429, retry_after=3600))
    assert len(requests(hub)) == 1


@pytest.mark.parametrize(("name", "revision"), [("acme/absent", "0" * 40), ("acme/one", "0" * 40)])
def test_what_is_not_there_is_named(hub, cache, name, revision):
    make_model(hub)
    with pytest.raises(InvalidInput, match=f"{name}|{revision}") as caught:
        fetch(cache, ModelSource(kind="hub", location=name, revision=revision))
    assert caught.value.code == "model_not_found"


def test_a_hub_that_is_down_is_asked_again_later(hub, cache, monkeypatch):
    source = make_model(hub)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        fetch(cache, source)
    assert caught.value.code == "hub_unavailable"


def test_a_cut_transfer_goes_on_where_it_stopped(hub, cache):
    fetch(cache, make_model(hub, cut=800_000, first=6))
    parts = served(hub)
    assert len(parts) > 2
    assert [part["start"] for part in parts] == [sum(one["sent"] for one in parts[:at]) for at in range(len(parts))]


def test_weights_kept_only_as_pickles_are_refused(hub, cache):
    (make_model(hub), (hub / "acme/one/model.safetensors").rename(hub / "acme/one/pytorch_model.bin"))
    with pytest.raises(InvalidInput, match="pickles are never read"):
        fetch(cache, pinned(hub))
    assert not any("pytorch_model" in line for line in requests(hub))


def test_an_index_that_names_a_shard_which_is_not_there_is_refused(hub, cache):
    make_model(hub)
    (hub / "acme/one/model.safetensors").rename(hub / "acme/one/model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.layers.0.self_attn.q_proj.weight": "model-00002-of-00002.safetensors"}}
    (hub / "acme/one/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match=r"00002\.safetensors is missing"):
        fetch(cache, pinned(hub))
    assert cache.weights_at_hand(pinned(hub)) is None


# --- damage in the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["changed", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("shorter", "gone"))]
)
def test_a_blob_that_was_damaged_in_the_cache_is_fetched_again_alone(hub, cache, damage):
    source = make_model(hub)
    blob = (fetch(cache, source) / "model.safetensors").resolve()
    content = blob.read_bytes()
    blob.unlink() if damage == "gone" else blob.write_bytes(content[:-1] + (b"x" if damage == "changed" else b""))
    before = len(requests(hub))
    assert cache.weights_at_hand(source) is None
    assert_whole(hub, fetch(cache, source))
    fetched = [line for line in requests(hub)[before:] if line.startswith("GET") and "/resolve/" in line]
    assert [line.rpartition("/")[2] for line in fetched] == ["model.safetensors"]


def test_what_was_verified_once_is_not_read_again(hub, cache):
    source = make_model(hub)
    blob = (fetch(cache, source) / "model.safetensors").resolve()
    time_of_mark = blob.stat().st_mtime_ns
    blob.write_bytes(b"x" * blob.stat().st_size)
    os.utime(blob, ns=(time_of_mark, time_of_mark))  # as no write of anybody's would leave it
    assert cache.weights_at_hand(source) is not None


# --- several processes ------------------------------------------------------------------------------------------------

WORKER = """
    import sys
    from pathlib import Path
    from core.job_spec import ModelSource
    from worker.model_cache import ModelCache

    cache, location, revision, act = Path(sys.argv[1]), *sys.argv[2:]
    source = ModelSource(kind="hub", location=location, revision=revision)
    with ModelCache(cache).hold(source):
        if act == "fetch":
            print(ModelCache(cache).fetch(source, lambda: None), flush=True)
        else:
            print("held", flush=True)
            sys.stdin.read()
"""


@pytest.fixture
def start(cache):
    """Start a worker of its own that fetches a model, or holds it; ended with the test."""
    started = []

    def start(source, act="fetch"):
        program = [
            sys.executable,
            "-c",
            textwrap.dedent(WORKER),
            str(cache.root),
            source.location,
            source.revision,
            act,
        ]
        started.append(
            subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_workers_that_want_the_same_model_fetch_each_byte_once(hub, cache, start):
    source = make_model(hub, bytes_per_second=2_000_000)
    workers = [start(source), start(source)]
    folders = [Path(worker.communicate(timeout=60)[0].decode().split()[-1]) for worker in workers]
    assert folders[0] == folders[1]
    assert_whole(hub, folders[0])
    fetched = [line for line in requests(hub) if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(set(fetched)) == 3
    assert sum(part["sent"] for part in served(hub)) == (hub / "acme/one/model.safetensors").stat().st_size


def test_a_worker_that_is_killed_half_way_is_followed_by_one_that_goes_on_from_there(hub, cache, start):
    source = make_model(hub, bytes_per_second=1_000_000)
    first = start(source)
    wait_until(lambda: half(cache) > 500_000, seconds=30)
    second = start(source)
    first.kill()
    assert second.communicate(timeout=60)[0]
    assert_whole(hub, cache.weights_at_hand(source))
    assert [part["start"] > 500_000 for part in served(hub)] == [False, True]
    assert not any(path.suffix == ".incomplete" for path in blobs(cache).iterdir())


def test_the_small_files_do_not_wait_behind_somebodys_weights(hub, cache, start):
    source = make_model(hub, bytes_per_second=100_000)
    start(source)
    wait_until(lambda: half(cache) > 0, seconds=30)
    small = cache.fetch_small(source, lambda: None)
    assert (small / "tokenizer.json").read_text() == "{} acme/one"
    assert cache.weights_at_hand(source) is None


def half(cache):
    return sum(path.stat().st_size for path in blobs(cache).glob("*.incomplete"))


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


class Enough(Exception):
    pass


def downloads():
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "worker.hub_download" in " ".join(command_line(child))
    ]


@pytest.mark.parametrize(
    "trouble",
    [
        {"bytes_per_second": 100_000},
        {"silent": True},
        {"status": 429, "retry_after": 60},
    ],
    ids=str,
)
def test_a_cancelled_job_stops_downloading_whatever_the_hub_is_doing(hub, tmp_path, trouble):
    source = make_model(hub, **trouble)
    patient = {"longest_wait_seconds": 100, "timeout_seconds": 100, "stall_seconds": 100}
    began = time.monotonic()

    def check():
        if requests(hub) and time.monotonic() - began > 2:
            assert downloads()
            raise Enough

    with pytest.raises(Enough):
        fetch(ModelCache(tmp_path / "cache", patience=patient), source, check)
    assert downloads() == []
    asked = len(requests(hub))
    time.sleep(0.5)
    assert len(requests(hub)) == asked


# --- room -------------------------------------------------------------------------------------------------------------


def age(cache, source, seconds):
    """As if the model had last been used so long ago."""
    mark = mark_file(cache.root, source.location, source.revision)
    then = time.time() - seconds
    os.utime(mark, (then, then))


def put(cache, hub, source):
    """What fetching the model would leave, without the second that a child takes."""
    folder = snapshot_folder(cache.root, source.location, source.revision)
    folder.mkdir(parents=True)
    blobs(cache, source.location).mkdir()
    files = {}
    for entry in fake_hub.Model(hub / source.location).listing():
        name, blob = entry["path"], entry.get("lfs", entry)["oid"]
        path = blobs(cache, source.location) / blob
        path.write_bytes((hub / source.location / name).read_bytes())
        (folder / name).symlink_to(f"../../blobs/{blob}")
        files[name] = {"blob": blob, "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    mark = mark_file(cache.root, source.location, source.revision)
    mark.parent.mkdir(parents=True)
    mark.write_text(json.dumps({"files": files, "left_out": []}))
    assert cache.weights_at_hand(source) == folder


def size(cache):
    return sum(path.stat().st_size for path in cache.root.glob("models--*/blobs/*"))


@pytest.fixture
def three(hub, cache):
    """Three models in the cache, the first the longest unused; and a fourth, not fetched yet, for which one must go."""
    sources = [make_model(hub, f"acme/{name}") for name in ("one", "two", "three")]
    for number, source in enumerate(sources):
        put(cache, hub, source)
        age(cache, source, 1000 - number)
    return sources, make_model(hub, "acme/four"), replace(cache, limit_bytes=size(cache) + 1000)


def there(cache, sources):
    return [cache.weights_at_hand(source) is not None for source in sources]


def test_the_model_that_was_unused_longest_makes_room(cache, three):
    sources, new, limited = three
    fetch(limited, new)
    assert there(cache, [*sources, new]) == [False, True, True, True]
    assert size(cache) <= limited.limit_bytes
    assert not mark_file(cache.root, "acme/one", sources[0].revision).exists()
    assert not any(blobs(cache).iterdir())


def test_a_use_is_remembered_of_a_model_whose_small_files_alone_are_there(cache, three):
    sources, new, _ = three
    one = sources[0]
    mark = mark_file(cache.root, one.location, one.revision)
    mark.rename(mark_file(cache.root, one.location, one.revision, small=True))
    with cache.hold(one):
        pass
    wanted = Wanted(new.location, new.revision, frozenset(), total_bytes=LARGE, missing_bytes=LARGE)
    with fetching(cache.root, new.location) as lock:
        removed = make_room(cache.root, wanted, lock, limit_bytes=size(cache) + 1000, reserve_bytes=0)
    assert removed == [f"acme/two@{sources[1].revision}"]


@pytest.mark.slow
def test_a_use_is_remembered_and_an_evicted_model_can_be_had_again(hub, cache, three):
    sources, new, limited = three
    fetch(limited, sources[0])
    fetch(limited, new)
    assert there(cache, sources) == [True, False, True]
    fetch(limited, sources[1])
    assert there(cache, [*sources, new]) == [True, True, False, True]


def test_a_model_that_any_process_uses_stays(cache, three, start):
    sources, new, limited = three
    holder = start(sources[0], act="hold")
    assert holder.stdout.readline() == b"held\n"
    with cache.hold(sources[1]):
        fetch(limited, new)
    assert there(cache, sources) == [True, True, False]
    holder.kill()
    holder.wait()
    fetch(limited, sources[2])
    assert there(cache, [*sources, new]).count(True) == 3


def test_a_job_keeps_both_of_its_models(cache, three, tmp_path):
    sources, new, limited = three
    pair = PairSource(name="acme", base=sources[0], instruct=sources[1])
    spec = make_spec("ftjob-1").model_copy(update={"pair": pair})
    settings = Settings(_env_file=None, data_dir=tmp_path / "data")
    settings.data_dir.mkdir()
    settings.model_cache_dir.symlink_to(cache.root)
    with holding_models(spec, settings):
        fetch(limited, new)
    assert there(cache, sources) == [True, True, False]


def test_nothing_is_removed_in_vain(cache, three):
    sources, new, limited = three
    with ExitStack() as held:
        for source in sources:
            held.enter_context(cache.hold(source))
        with pytest.raises(Unavailable, match="what could be removed is in use") as caught:
            fetch(limited, new)
    assert caught.value.code == "model_cache_full"
    assert there(cache, sources) == [True, True, True]


def test_a_model_above_the_limit_is_refused_before_anything_goes(cache, three):
    sources, new, _ = three
    with pytest.raises(InvalidInput, match="may hold 1000000") as caught:
        fetch(replace(cache, limit_bytes=1_000_000), new)
    assert caught.value.code == "model_too_large"
    assert there(cache, sources) == [True, True, True]


@pytest.mark.slow
def test_a_commit_that_goes_leaves_the_blobs_that_another_one_shares(hub, cache):
    old = make_model(hub)
    fetch(cache, old)
    age(cache, old, 1000)
    (hub / "acme/one/tokenizer.json").write_text("t" * 5000)
    new = pinned(hub)
    fetch(cache, new)
    (hub / "acme/one/tokenizer.json").write_text("t" * 5100)
    newest = pinned(hub)
    with cache.hold(new):
        fetch(replace(cache, limit_bytes=size(cache) + 5090), newest)
    assert there(cache, [old, new, newest]) == [False, True, True]
    assert_whole(hub, cache.weights_at_hand(newest))
    assert len(served(hub)) == 1


def test_what_a_dead_download_left_goes_first(hub, cache):
    kept = make_model(hub, "acme/kept")
    put(cache, hub, kept)
    left = blobs(cache, "acme/dead") / f"{'0' * 64}.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 1_000_000)
    os.utime(left, (0, 0))
    source = make_model(hub)
    fetch(replace(cache, limit_bytes=2 * LARGE + 100_000), source)
    assert not left.exists()
    assert there(cache, [kept, source]) == [True, True]


@pytest.mark.slow
def test_what_a_running_download_is_still_to_get_is_not_given_to_another(hub, cache, start):
    source = make_model(hub, bytes_per_second=200_000)
    first = start(source)
    wait_until(lambda: half(cache) > 0, seconds=30)
    with pytest.raises(Unavailable) as caught:
        fetch(replace(cache, limit_bytes=2 * LARGE - 100_000), make_model(hub, "acme/two"))
    assert caught.value.code == "model_cache_full"
    assert first.poll() is None


def test_a_disk_without_room_is_named_before_a_byte_is_fetched(hub, cache):
    source = make_model(hub)
    with pytest.raises(Unavailable) as caught:
        fetch(replace(cache, reserve_bytes=10**18), source)
    assert caught.value.code == "storage_full"
    needed = sum(path.stat().st_size for path in fake_hub.Model(hub / "acme/one").files().values())
    for named in (needed, 10**18, cache.root):
        assert str(named) in caught.value.message
    assert not any("/resolve/" in line for line in requests(hub))


# --- without the Hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(hub, cache, monkeypatch):
    """Fetch a model, then cut the line."""

    def cut(source):
        fetch(cache, source)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        return len(requests(hub))

    return cut


def test_a_model_in_the_cache_needs_no_hub_and_one_that_is_not_there_is_named(hub, cache, offline):
    source, absent = make_model(hub), make_model(hub, "acme/two")
    asked = offline(source)
    assert_whole(hub, fetch(cache, source))
    with pytest.raises(InvalidInput, match=r"acme/two .*HF_HUB_OFFLINE") as caught:
        fetch(cache, absent)
    assert caught.value.code == "model_not_found"
    assert len(requests(hub)) == asked


@pytest.mark.parametrize("damaged", [False, True])
def test_a_cache_that_somebody_else_filled_is_verified_and_used(hub, cache, offline, damaged):
    source = make_model(hub)
    asked = offline(source)
    shutil.rmtree(cache.root / ".shadowft")
    weights = snapshot_folder(cache.root, "acme/one", source.revision) / "model.safetensors"
    if damaged:
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(StepFailed, match=r"model\.safetensors in the models' cache"):
            fetch(cache, source)
    else:
        assert_whole(hub, fetch(cache, source))
        assert "model.safetensors" in read_mark(mark_file(cache.root, "acme/one", source.revision))["files"]
    assert len(requests(hub)) == asked


# --- the token --------------------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_to_nobody_it_points_to(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = make_model(hub, token=TOKEN)
    assert_whole(hub, fetch(cache, source))
    assert {line["authorization"] for line in served(hub, "hub")} == {f"Bearer {TOKEN}"}
    assert [line["authorization"] for line in served(hub, "cdn")] == [None]


@pytest.mark.parametrize("trouble", [{"gated": True}, {"wrong_bytes": True}], ids=str)
def test_the_token_is_in_no_error_and_no_log(hub, cache, monkeypatch, capfd, caplog, trouble):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = make_model(hub, token=TOKEN, **trouble)
    with pytest.raises(ShadowError) as caught:
        fetch(cache, source)
    said = "".join(capfd.readouterr())
    assert TOKEN not in f"{caught.value.cause} {said} {caplog.text}"
    kept = [path.read_bytes() for path in cache.root.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in kept)


def test_a_download_knows_the_token_and_nothing_else_that_is_secret(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("SHADOWFT_DATABASE_URL", "postgresql://user:password@db/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    source = make_model(hub, bytes_per_second=200_000)
    seen = []

    def check():
        if requests(hub):
            seen.extend(child.environ() for child in downloads())
            raise Enough

    with pytest.raises(Enough):
        fetch(cache, source, check)
    assert seen[0]["HF_TOKEN"] == TOKEN
    assert not {"SHADOWFT_DATABASE_URL", "AWS_SECRET_ACCESS_KEY"} & seen[0].keys()
