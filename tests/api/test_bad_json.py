"""Bodies that are no job: each gets one clear error, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import socket

import pytest

from tests.api.talk import as_json, job_body, nested, objects, routes, told, traces

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
    "NUL in a nested key": job_body(shadow={"evaluation": {"probes": {"a\0": "file-x"}}}),
    "half a surrogate": spoilt('"\\ud800"'),
    "half a surrogate in a key": GOOD[:-1] + ', "metadata": {"\\udfff": "x"}}',
    "a surrogate pair the wrong way round": spoilt('"\\udc00\\ud800"'),
    "1e400": spoilt("1e400"),
    "-1e400": spoilt("-1e400"),
    "1 and 400 zeros": spoilt("1" + "0" * 400 + ".0"),
    "plus sign": spoilt("+1"),
    "no digit before the point": spoilt(".5"),
    "no digit after the point": spoilt("1."),
    "hexadecimal": spoilt("0x10"),
    "underscore": spoilt("1_000"),
    "Arabic digits": spoilt("١٢"),
    "Python's None": spoilt("None"),
    "Python's True": spoilt("True"),
    "undefined": spoilt("undefined"),
    "key twice": spoilt("1")[:-1] + ', "seed": 2}',
    "key twice, the second escaped": GOOD[:-1] + ', "seed": 1, "s\\u0065ed": 2}',
    "key twice, nested": GOOD[:-1] + ', "shadow": {"graft": {"scale": 1, "scale": 2}}}',
    "BOM": "\ufeff" + GOOD,
    "not UTF-8": GOOD.replace("file-x", "file-\udcff"),
    "UTF-8 that is overlong": GOOD.replace("file-x", "file-\udcc0\udc80"),
    "a surrogate in UTF-8": GOOD.replace("file-x", "file-\udced\udca0\udc80"),
    "trailing bytes": GOOD + " x",
    "trailing brace": GOOD + "}",
    "trailing NUL": GOOD + "\0",
    "trailing comma": GOOD[:-1] + ",}",
    "two values": GOOD + GOOD,
    "two lines": GOOD + "\n" + GOOD,
    "cut": GOOD[:-5],
    "cut in an escape": GOOD[:-1] + ', "suffix": "\\u00',
    "deep list": spoilt(nested(10_000)),
    "very deep list": spoilt(nested(20_000)),
    "deep object": spoilt(objects(900)),
    "depth 33": spoilt(objects(33)),
    "single quotes": GOOD.replace('"', "'"),
    "comment": GOOD + "// why",
    "comment inside": GOOD[:-1] + "/* why */}",
    "a tab in a string": spoilt('"a\tb"'),
    "a line break in a string": spoilt('"a\nb"'),
    "an escape that is none": spoilt('"\\x41"'),
    "a form feed between values": "\f" + GOOD,
    "only spaces": "   ",
    "only a NUL": "\0",
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_not_strictly_json_is_refused(api, client, case):
    before = traces(api)
    body = NOT_JSON[case]
    content = body.encode("utf-8", "surrogateescape")
    answer = client.http.post("/fine_tuning/jobs", content=content, headers={"content-type": "application/json"})
    assert told(answer)["code"] == ("missing_required_parameter" if body.isspace() else "invalid_json")
    assert traces(api) == before


@pytest.mark.parametrize("text", ['{"name": "\\ud800"}', '{"name": "a\\u0000"}', '{"\\udfff": 1}'])
def test_no_route_that_takes_json_takes_text_that_is_none(api, text):
    taking = [
        path
        for method, path in routes(api.http.get("/openapi.json").json())
        if method == "POST" and path != "/v1/files"
    ]
    admin = {"authorization": f"Bearer {api.admin_key}"}
    said = {path: api.http.post(path, headers=admin, content=text) for path in taking}
    assert {"/v1/pairs", "/v1/pairs/check", "/v1/fine_tuning/jobs", "/v1/uploads"} <= said.keys()
    assert {path for path, answer in said.items() if answer.status_code >= 500} == set()
    for path in ("/v1/pairs", "/v1/pairs/check", "/v1/fine_tuning/jobs", "/v1/uploads"):
        told(api.http.post(path, **as_json(text)), code="invalid_json")


@pytest.mark.parametrize("body", ["null", "[]", '"x"', "3", "true", "[{}]", "-0", "1e5", ""])
def test_what_is_no_object_is_refused(client, body):
    error = told(client.http.post("/fine_tuning/jobs", **as_json(body)))
    assert "JSON object" in error["message"]


#: Odd, and right: what is refused is refused for what it says.
ODD_BUT_JSON = {
    "-0 is an integer, and zero": (spoilt("-0"), "training_file"),
    "-0.0 is none": (spoilt("-0.0"), "seed"),
    "1e2 is none": (spoilt("1e2"), "seed"),
    "the largest integer": (spoilt(str(2**63 - 1)), "seed"),
    "a number of many digits": (spoilt("0." + "1" * 1000), "seed"),
    "a pair of surrogates": (GOOD[:-1] + ', "metadata": {"\\ud83d\\ude00": "x"}}', "training_file"),
    "control characters, escaped": (job_body(metadata={"a\x01": "\x1f\x7f"}), "training_file"),
    "an escaped slash": (GOOD.replace("file-x", "file\\/x"), "training_file"),
    "white space everywhere": ("\r\n\t " + GOOD.replace(":", " :\n") + "\r\n", "training_file"),
    "an empty key": (job_body(metadata={"": "x"}), "training_file"),
    "a megabyte's worth of elements": (job_body(integrations=[{}] * 10_000), "integrations"),
    "ten thousand keys": (job_body(metadata={str(n): "" for n in range(4000)}), "metadata"),
    "a long string": (job_body(suffix="x" * 40_000), "suffix"),
    "prototype": (job_body(__proto__={"seed": 1}), "__proto__"),
}


@pytest.mark.parametrize("case", ODD_BUT_JSON)
def test_odd_json_is_read_as_what_it_says(api, client, case):
    body, param = ODD_BUT_JSON[case]
    before = traces(api)
    told(client.http.post("/fine_tuning/jobs", **as_json(body)), param=param)
    assert traces(api) == before


def test_the_key_that_occurs_twice_is_named(client):
    error = told(client.http.post("/fine_tuning/jobs", **as_json(NOT_JSON["key twice, nested"])), code="invalid_json")
    assert "'scale' occurs twice" in error["message"]


TYPES = [
    *("text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "multipart/form-data", None),
    *("text/json", "application/jsonp", "application/json; charset=latin1", "application/json; charset=utf-16", "x"),
]


@pytest.mark.parametrize("kind", TYPES)
def test_another_content_type_or_charset_is_refused(api, client, kind):
    before = traces(api)
    headers = {"content-type": kind} if kind else {}
    answer = client.http.post("/fine_tuning/jobs", content=GOOD.encode(), headers=headers)
    told(answer, 415, "unsupported_media_type")
    assert traces(api) == before


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", 'application/json; charset="UTF-8"'])
def test_json_may_be_named_in_every_usual_way(client, kind):
    answer = client.http.post("/fine_tuning/jobs", content=GOOD.encode(), headers={"content-type": kind})
    told(answer, 400, "file_not_found")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
@pytest.mark.parametrize("path", ["/fine_tuning/jobs", "/grafts", "/files"])
def test_a_compressed_body_is_refused_unread(api, client, path, encoding):
    before = traces(api)
    bomb = gzip.compress(b" " * 10_000_000)
    headers = {"content-type": "application/json", "content-encoding": encoding}
    told(client.http.post(path, content=bomb, headers=headers), 415, "unsupported_media_type")
    assert traces(api) == before


LENGTHS = ["-1", "1e3", "abc", "9" * 30, "+5", "0x10", "1,2", ""]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_is_none_gets_no_job(api, client, length):
    before = traces(api)
    status, _ = raw(api, client, f"Content-Length: {length}", GOOD.encode())
    assert 400 <= status < 500
    assert traces(api) == before


def test_a_body_cut_by_its_own_length_is_not_json(api, client):
    before = traces(api)
    assert raw(api, client, f"Content-Length: {len(GOOD) - 5}", GOOD.encode())[0] == 400
    assert traces(api) == before


def test_both_a_length_and_pieces_are_refused(api, client):
    before = traces(api)
    pieces = f"{len(GOOD):x}\r\n{GOOD}\r\n0\r\n\r\n".encode()
    raw(api, client, f"Content-Length: {len(GOOD)}\r\nTransfer-Encoding: chunked", pieces)
    assert traces(api) == before


@pytest.mark.parametrize("pieces", [b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n", b"fffffffffffffffff\r\n{}"])
def test_pieces_that_are_none_get_no_job(api, client, pieces):
    before = traces(api)
    raw(api, client, "Transfer-Encoding: chunked", pieces)
    assert client.http.get("/files").status_code == 200
    assert traces(api) == before


def test_a_body_in_pieces_is_a_body(client):
    body = job_body(training_file=client.upload()).encode()
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))
    answer = client.http.post("/fine_tuning/jobs", content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 200


def raw(api, client, headers, content):
    """Status and body of what the server answers to these very bytes; 0 where it just hangs up."""
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        head = f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.member.key}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n{headers}\r\n\r\n".encode() + content)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    first, _, rest = answer.partition(b"\r\n")
    return (int(first.split()[1]), rest) if first else (0, b"")


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
    "shadow.tuning.learning_rat": ({"shadow": {"tuning": {"learning_rat": 1e-4}}}, "shadow.tuning.learning_rate"),
    "hyperparameters.n_epoch": ({"hyperparameters": {"n_epoch": 3}}, "hyperparameters.n_epochs"),
    "trainingfile": ({"trainingfile": "file-x"}, "training_file"),
    "shadow.tuning.rang": ({"shadow": {"tuning": {"rang": 4}}}, "shadow.tuning.rank"),
    "learning_rate": ({"learning_rate": 1e-4}, "shadow.tuning.learning_rate"),
    "shadow.scale": ({"shadow": {"scale": 1}}, "shadow.graft.scale"),
    "method.supervised.hyperparameters.batchsize": (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batchsize": 1}}}},
        "method.supervised.hyperparameters.batch_size",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_misspelt_or_misplaced_field_is_named_with_what_was_meant(client, name):
    fields, meant = UNKNOWN[name]
    answer = client.http.post("/fine_tuning/jobs", **as_json(job_body(**fields)))
    assert f"Did you mean '{meant}'?" in told(answer, code="unknown_parameter", param=name)["message"]


@pytest.mark.parametrize("name", ["hyperparameters.beta", "shadow.tuning.size"])
def test_an_unknown_field_that_is_like_none_gets_no_suggestion(client, name):
    parents, _, last = name.rpartition(".")
    value: object = {last: 1}
    for parent in reversed(parents.split(".")):
        value = {parent: value}
    answer = client.http.post("/fine_tuning/jobs", **as_json(job_body(**value)))
    assert "Did you mean" not in told(answer, code="unknown_parameter", param=name)["message"]


@pytest.mark.parametrize("shown", ["null", "true", "[null, 1.5]", '{"a": false}'])
def test_a_value_is_shown_as_json_has_it(client, shown):
    answer = client.http.post("/fine_tuning/jobs", **as_json(job_body(training_file=json.loads(shown))))
    assert told(answer, param="training_file")["message"].endswith(f"; found {shown}.")


@pytest.mark.parametrize(
    ("path", "name", "meant"),
    [
        ("/fine_tuning/jobs", "limt", "limit"),
        ("/fine_tuning/jobs", "metdata[a]", None),
        ("/fine_tuning/jobs", "limit[a]", None),
        ("/fine_tuning/jobs", "before", None),
        ("/files", "purpos", "purpose"),
        ("/fine_tuning/jobs/ftjob-x/events", "streaming", "stream"),
        ("/fine_tuning/jobs/ftjob-x", "limit", None),
        ("/grafts", "aftre", "after"),
    ],
)
def test_an_unknown_query_parameter_is_named_with_what_was_meant(client, path, name, meant):
    error = told(client.http.get(path, params={name: "1"}), code="unknown_parameter", param=name)
    assert (f"Did you mean '{meant}'?" in error["message"]) is (meant is not None)


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
