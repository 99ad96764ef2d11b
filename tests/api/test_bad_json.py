"""Bodies that are no job: each gets one clear error, and leaves nothing behind."""

from __future__ import annotations

import json
import socket

import pytest

from tests.api.talk import as_json, job_body, nested, objects, told, traces

GOOD = job_body()


def spoilt(value: str) -> str:
    """A good body whose seed is this very text."""
    return GOOD[:-1] + f', "seed": {value}}}'


NOT_JSON = {
    "NaN": spoilt("NaN"),
    "Infinity": spoilt("Infinity"),
    "-Infinity": spoilt("-Infinity"),
    "1e999": spoilt("1e999"),
    "2**63": spoilt(str(2**63)),
    "-2**63-1": spoilt(str(-(2**63) - 1)),
    "5000 digits": spoilt("9" * 5000),
    "octal": spoilt("017"),
    "NUL in a value": job_body(suffix="a\0b"),
    "NUL in a key": job_body(metadata={"a\0": "b"}),
    "half a surrogate": spoilt('"\\ud800"'),
    "BOM": "\ufeff" + GOOD,
    "not UTF-8": GOOD.replace("file-x", "file-\udcff"),
    "trailing bytes": GOOD + " x",
    "two values": GOOD + GOOD,
    "cut": GOOD[:-5],
    "deep list": spoilt(nested(100_00)),
    "deep object": spoilt(objects(900)),
    "depth 33": spoilt(objects(33)),
    "single quotes": GOOD.replace('"', "'"),
    "comment": GOOD + "// why",
    "only spaces": "   ",
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_not_strictly_json_is_refused(api, client, case):
    before = traces(api)
    body = NOT_JSON[case]
    content = body.encode("utf-8", "surrogateescape")
    answer = client.http.post("/fine_tuning/jobs", content=content, headers={"content-type": "application/json"})
    assert told(answer)["code"] in {"invalid_json", "invalid_value"}
    assert traces(api) == before


@pytest.mark.parametrize("body", ["null", "[]", '"x"', "3", "true", "[{}]", ""])
def test_what_is_no_object_is_refused(client, body):
    told(client.http.post("/fine_tuning/jobs", **as_json(body)))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", None])
def test_another_content_type_is_refused(client, kind):
    headers = {"content-type": kind} if kind else {}
    told(client.http.post("/fine_tuning/jobs", content=GOOD.encode(), headers=headers))


WRONG = {
    "seed as text": ({"seed": "1"}, "seed"),
    "seed as truth": ({"seed": True}, "seed"),
    "seed as float": ({"seed": 1.0}, "seed"),
    "seed negative": ({"seed": -1}, "seed"),
    "seed 2**31": ({"seed": 2**31}, "seed"),
    "model as number": ({"model": 3}, "model"),
    "model null": ({"model": None}, "model"),
    "model empty": ({"model": ""}, "model"),
    "model long": ({"model": "x" * 257}, "model"),
    "file as list": ({"training_file": ["file-x"]}, "training_file"),
    "suffix empty": ({"suffix": ""}, "suffix"),
    "suffix long": ({"suffix": "x" * 65}, "suffix"),
    "suffix with a path": ({"suffix": "../x"}, "suffix"),
    "suffix with a line break": ({"suffix": "x\n"}, "suffix"),
    "metadata as list": ({"metadata": []}, "metadata"),
    "metadata of 17": ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    "metadata value long": ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    "metadata value number": ({"metadata": {"a": 1}}, "metadata.a"),
    "metadata nested": ({"metadata": {"a": {}}}, "metadata.a"),
    "epochs 0": ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    "epochs half": ({"hyperparameters": {"n_epochs": 0.5}}, "hyperparameters.n_epochs"),
    "epochs a word": ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
    "epochs 1e9": ({"hyperparameters": {"n_epochs": 10**9}}, "hyperparameters.n_epochs"),
    "batch 0": ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
    "multiplier 0": (
        {"hyperparameters": {"learning_rate_multiplier": 0}},
        "hyperparameters.learning_rate_multiplier",
    ),
    "rate 0": ({"shadow": {"tuning": {"learning_rate": 0}}}, "shadow.tuning.learning_rate"),
    "rate 10": ({"shadow": {"tuning": {"learning_rate": 10}}}, "shadow.tuning.learning_rate"),
    "rank 0": ({"shadow": {"tuning": {"rank": 0}}}, "shadow.tuning.rank"),
    "alpha 0": ({"shadow": {"tuning": {"alpha": 0}}}, "shadow.tuning.alpha"),
    "length 0": ({"shadow": {"tuning": {"max_length": 0}}}, "shadow.tuning.max_length"),
    "full with a rank": ({"shadow": {"tuning": {"type": "full", "rank": 4}}}, "shadow.tuning"),
    "scale 3": ({"shadow": {"graft": {"scale": 3}}}, "shadow.graft.scale"),
    "scope a word": ({"shadow": {"graft": {"scope": "some"}}}, "shadow.graft.scope"),
    "pattern empty": ({"shadow": {"graft": {"include": [""]}}}, "shadow.graft.include.0"),
    "pattern long": ({"shadow": {"graft": {"exclude": ["x" * 201]}}}, "shadow.graft.exclude.0"),
    "pattern as text": ({"shadow": {"graft": {"include": "*"}}}, "shadow.graft.include"),
    "33 patterns": ({"shadow": {"graft": {"exclude": ["*"] * 33}}}, "shadow.graft.exclude"),
    "dtype a word": ({"shadow": {"graft": {"output_dtype": "float16"}}}, "shadow.graft.output_dtype"),
    "delta as number": ({"shadow": {"publish": {"delta": 1}}}, "shadow.publish.delta"),
    "direct with a graft": ({"shadow": {"strategy": "direct", "graft": {"scale": 1}}}, "shadow"),
    "holdout all": ({"shadow": {"evaluation": {"holdout_ratio": 1}}}, "shadow.evaluation.holdout_ratio"),
    "nine scales": ({"shadow": {"evaluation": {"scales": [0] * 9}}}, "shadow.evaluation.scales"),
    "probe with a path": ({"shadow": {"evaluation": {"probes": {"../x": "file-x"}}}}, "training_file"),
    "method dpo": ({"method": {"type": "dpo"}}, "method.type"),
    "method of two kinds": ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
    "method unknown": ({"method": {"type": "magic"}}, "method.type"),
    "integrations": ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named(api, client, case):
    fields, param = WRONG[case]
    before = traces(api)
    error = told(client.http.post("/fine_tuning/jobs", **as_json(job_body(**fields))), param=param)
    assert error["type"] == "invalid_request_error"
    assert traces(api) == before


@pytest.mark.parametrize("name", ["model", "training_file"])
def test_a_missing_field_is_named(client, name):
    body = json.loads(GOOD)
    del body[name]
    told(client.http.post("/fine_tuning/jobs", json=body), code="missing_required_parameter", param=name)


UNKNOWN = {
    "learning_rat": {"shadow": {"tuning": {"learning_rat": 1e-4}}},
    "n_epoch": {"hyperparameters": {"n_epoch": 3}},
    "trainingfile": {"trainingfile": "file-x"},
    "rang": {"shadow": {"tuning": {"rang": 4}}},
}
MEANT = {"learning_rat": "learning_rate", "n_epoch": "n_epochs", "trainingfile": "training_file", "rang": "rank"}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_misspelt_field_is_named_with_what_was_meant(client, name):
    answer = client.http.post("/fine_tuning/jobs", **as_json(job_body(**UNKNOWN[name])))
    assert f"Did you mean '{MEANT[name]}'?" in told(answer, code="unknown_parameter")["message"]


@pytest.mark.parametrize(
    "name", ["status", "attempt", "team_id", "created_at", "trust_remote_code", "is_admin", "spec"]
)
def test_what_is_not_the_clients_to_say_is_refused(client, name):
    told(client.http.post("/fine_tuning/jobs", **as_json(job_body(**{name: 1}))), code="unknown_parameter", param=name)


PATHS = ["../x", "/etc", "C:\\x", "a/b/c", "https://h/x", "/proc/self/environ", "file:///etc/passwd"]
NEARLY = ["x" * 97, "qwen2.5-0.5b ", "QWEN2.5-0.5B", "ｑwen2.5-0.5b"]


@pytest.mark.parametrize("model", PATHS + NEARLY)
def test_an_unknown_model_is_not_looked_for_anywhere(client, model):
    file_id = client.upload()
    answer = client.http.post("/fine_tuning/jobs", json={"model": model, "training_file": file_id})
    told(answer, 404, "model_not_found", "model")


def test_a_file_that_is_not_there_or_cannot_be_used_is_named(client):
    broken, other = client.upload(), client.upload(purpose="user_data")
    client.check_file(broken, error="Row 1 is empty.")
    for file_id, code in [
        ("file-unknown", "file_not_found"),
        (broken, "invalid_training_file"),
        (other, "invalid_value"),
    ]:
        answer = client.http.post("/fine_tuning/jobs", **as_json(job_body(training_file=file_id)))
        told(answer, 400, code, "training_file")


def test_a_deleted_file_and_a_file_against_itself_are_named(client):
    gone, kept = client.upload(), client.upload()
    client.http.delete(f"/files/{gone}")
    told(client.http.post("/fine_tuning/jobs", **as_json(job_body(training_file=gone))), 400, "file_not_found")
    body = job_body(training_file=kept, validation_file=kept)
    told(client.http.post("/fine_tuning/jobs", **as_json(body)), 400, param="validation_file")


def test_the_depth_and_the_numbers_that_are_allowed_pass(client):
    deep = job_body(training_file=client.upload(), seed=2**31 - 1, metadata={"a": "x" * 512})
    assert client.http.post("/fine_tuning/jobs", **as_json(deep)).status_code == 200


def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not(api, client):
    large = job_body(suffix="x" * api.settings.max_json_bytes)
    before = traces(api)
    told(client.http.post("/fine_tuning/jobs", **as_json(large)), 413, "too_large")
    pieces = (large[start : start + 9000].encode() for start in range(0, len(large), 9000))
    answer = client.http.post("/fine_tuning/jobs", content=pieces, headers={"content-type": "application/json"})
    told(answer, 413, "too_large")
    assert traces(api) == before


def test_a_body_that_ends_before_its_length_leaves_nothing(api, client):
    before = traces(api)
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        head = f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.member.key}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n{GOOD}".encode())
    assert client.http.get("/files").status_code == 200
    assert traces(api) == before


BAD_PAIRS = [
    ({"name": "a b"}, 400),
    ({"base": "../x"}, 400),
    ({"base": "/etc"}, 400),
    ({"base": "file:///etc/passwd"}, 400),
    ({"instruct": "a/b"}, 400),
    ({"base_revision": ""}, 400),
    ({"extra": 1}, 400),
    ({"name": "qwen3-0.6b"}, 409),
]


@pytest.mark.parametrize(("fields", "status"), BAD_PAIRS, ids=str)
def test_a_bad_pair_is_refused(api, fields, status):
    before = traces(api)
    body = {"name": "mine", "base": "a/b", "instruct": "a/c"} | fields
    told(api.http.post("/v1/pairs", json=body), status)
    assert traces(api) == before
