"""The catalogue: what it says, about which pair, and how it knows."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from pydantic import ValidationError

import core.catalogue
from core.catalogue import catalogue_counts, catalogue_pairs, read_catalogue

TEXT = Path(core.catalogue.__file__).with_name("pairs.toml").read_text()
SMALL = """
[[family]]
name = "Acme"

[[family.pairs]]
name = "acme-{}"
base = "acme/Acme-{}-Base"
instruct = "acme/Acme-{}"
sizes = ["1B", "7B"]

[[family.licence]]
text = "acme-research"
only = ["acme-7b"]

[[family.licence]]
text = "mit"
seen = "its card"

[[family.caution]]
kind = "tied"
text = "Tied."
seen = "config.json of the small one"
seen_for = ["acme-1b"]
"""


def pair(name):
    (found,) = [pair for pair in catalogue_pairs() if pair.name == name]
    return found


def cautions(name, kind):
    return [caution for caution in pair(name).cautions if caution.kind == kind]


def test_a_pattern_stands_for_each_size_and_a_claim_for_those_it_names():
    small, large = read_catalogue(SMALL)
    assert (small.name, small.base, small.instruct) == ("acme-1b", "acme/Acme-1B-Base", "acme/Acme-1B")
    assert (small.licence.text, small.licence.source) == ("mit", "verified")
    assert (large.licence.text, large.licence.source) == ("acme-research", "memory")
    assert [one.cautions[0].source for one in (small, large)] == ["verified", "memory"]
    assert small.ids.source == "memory"
    assert small.gated is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sizes =", "size ="),
        ('kind = "tied"', 'kind = "odd"'),
        ('text = "Tied."', 'text = "Tied."\nfrom = "memory"'),
        ('seen = "config.json of the small one"\n', ""),
        ('text = "mit"', "text = 1"),
        ('text = "mit"', 'text = "mit"\nonly = ["acme-1"]'),
        ("[[family]]", "[[famly]]"),
    ],
)
def test_a_slip_in_the_file_is_an_error(old, new):
    assert old in SMALL
    with pytest.raises((ValidationError, ValueError)):
        read_catalogue(SMALL.replace(old, new, 1))


def test_every_pattern_of_the_catalogue_fits_a_pair_of_its_family():
    for family in tomllib.loads(TEXT)["family"]:
        names = [one.name for one in catalogue_pairs() if one.family == family["name"]]
        claims = [*family["licence"], *family.get("gated", []), *family.get("caution", [])]
        patterns = [pattern for claim in claims for key in ("only", "seen_for") for pattern in claim.get(key, [])]
        assert [one for one in patterns if not any(fnmatchcase(name, one) for name in names)] == []


def test_a_pair_is_told_a_thing_once():
    for one in catalogue_pairs():
        texts = [caution.text for caution in one.cautions]
        assert len(set(texts)) == len(texts), one.name


def test_the_counts_add_up():
    counts = catalogue_counts()
    assert sum(counts["pairs"]) == len(catalogue_pairs())
    assert sum(counts["claims"]) == sum(len(one.claims) for one in catalogue_pairs())


def test_names_that_jobs_were_submitted_with_stay():
    names = {one.name for one in catalogue_pairs()}
    assert {
        *("qwen3-0.6b", "qwen3-30b-a3b", "qwen3-2507-4b", "qwen2.5-0.5b", "qwen2.5-coder-32b", "llama-3.1-70b"),
        *("llama-3.2-1b", "gemma-2-9b", "gemma-3-4b", "olmo-2-1124-7b", "falcon3-10b", "smollm2-1.7b"),
        "granite-3.3-8b",
    } <= names


def test_what_is_reported_of_one_size_is_said_of_that_size_only():
    assert "0.1075" in cautions("gemma-3-4b", "sigma")[0].text
    assert cautions("falcon3-10b", "failure")
    for name in ("gemma-3-1b", "gemma-3-12b", "falcon3-7b", "falcon3-1b"):
        assert cautions(name, "sigma") == cautions(name, "failure") == []


def test_a_gated_family_says_what_to_do():
    gated = {one.family for one in catalogue_pairs() if one.gated}
    assert {"Llama 3", "Gemma 2", "Gemma 3"} <= gated
    assert all("HF_TOKEN" in one.gated.text for one in catalogue_pairs() if one.gated)
