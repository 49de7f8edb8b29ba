"""Text that leaves the program: no secret, one printable line, of bounded length."""

import pytest

from reshard.errors import ReshardError, SourceError
from reshard.limits import LINE_CHARACTERS
from reshard.safe_text import keep_secret, printable, redacted, safe_line
from reshard.source.base import Origin


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/r1?X-Amz-Signature=abc&y=1 is away", "https://host/r1 is away"),
        ("ftp://user:pass@word@host/r1 is away: me@home", "ftp://host/r1 is away: me@home"),
        ("s3://AKIA:ab/S3CR3T@bucket/path: gone", "s3://bucket/path: gone"),
        ("'https://T0KEN@host/r1'", "'https://host/r1'"),
        ("github://org:repo:T0KEN@main/r1", "github://main/r1"),
        ("zip://r1::s3://key:secret@bucket/r1.zip?versionId=1", "zip://r1::s3://bucket/r1.zip"),
        ("Invalid bucket name 'AKIA:S3CR3T@bucket'", "Invalid bucket name '***@bucket'"),
        ("HF_ENDPOINT=user:S3CR3T@host: is no address", "HF_ENDPOINT=***@host: is no address"),
        ("Max retries exceeded with url: /r1?token=S3CR3T (Caused by", "Max retries exceeded with url: /r1 (Caused by"),
        ("S3FileSystem(key='AKIA', secret='S3CR3T')", "S3FileSystem(key='AKIA', secret=***')"),
        ("Illegal header value b'Bearer hf_S3CR3T\\n'", "Illegal header value b'Bearer ***\\n'"),
        ("aws_secret_access_key=S3CR3T, region=x", "aws_secret_access_key=***, region=x"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == safe_line(text) == str(ReshardError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name@v1: has no revision",
        "tokens_per_rank=[5, 1]: expected 4",
        "simplecache::s3://bucket/r1@v2",
        "model.safetensors: is this a hub?",
        "--set KEY=VALUE: expected a number",
        "/data/a:b@c/model: no such folder",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert safe_line(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b]0;x\x07\nb\x7f\x9b", r"a\x1b]0;x\x07\nb\x7f\x9b"),
        ("::error::x", r"\x3a:error::x"),
        ("  ::error::x", r"  \x3a:error::x"),
        ("a ##[error]x ##vso[task]", r"a #\x23[error]x #\x23vso[task]"),
        ("left\u202eright\u2066", r"left\u202eright\u2066"),
        ("mod\udcffel", r"mod\udcffel"),
        ("größe 模型 [bold]", "größe 模型 [bold]"),
    ],
)
def test_what_a_terminal_or_a_ci_log_would_obey_is_spelt_out(text: str, shown: str) -> None:
    assert safe_line(text) == str(SourceError(text)) == shown
    assert safe_line(shown) == shown


def test_a_long_text_keeps_both_ends() -> None:
    line = safe_line("model.layers." + "9" * 9_900_000 + ": no such layer; check the config")
    assert len(line) == LINE_CHARACTERS
    assert line.startswith("model.layers.999")
    assert line.endswith("9: no such layer; check the config")
    assert "(9,900,047 characters)" in safe_line("x" * 9_900_047)


@pytest.mark.parametrize("text", ["://", "://a:@", "?a=", "token=", "a:b@", "Bearer abcdef "])
def test_the_work_grows_with_the_length_alone(text: str) -> None:
    """Whole documents are looked through, too: what is quadratic takes minutes here."""
    redacted(text * 200_000)


@pytest.mark.parametrize("value", ["S3CR3Tabc/def+ghi==", "S3CR3T\"'\\x", "S3CR3T\nline"])
@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SOME_API_KEY"])
def test_what_the_environment_holds_is_hidden(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    for text in (value, repr(value), printable(value)):
        assert "S3CR3T" not in safe_line(f"the server says {text}")


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HTTPS_PROXY"])
def test_so_is_the_password_of_an_address_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://user:S3CR3T@host:1/?token=S3CR3T2")
    assert safe_line("login S3CR3T, S3CR3T2 refused; S3CR3Ts stay") == "login ***, *** refused; S3CR3Ts stay"


def test_short_values_hide_no_ordinary_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    assert safe_line("test of testings") == "test of testings"
    assert safe_line("no user testing.") == "no user ***."


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("s3://AKIA:ab/K3PTS3CR3T@bucket", 'Invalid bucket name "AKIA:ab" and key "K3PTS3CR3T@bucket"'),
        ("github://org:repo:K3PTT0KEN@main", "404 for https://api.github.com/repos/org/repo:K3PTT0KEN/x"),
        ("http://user:p%40K3PTS3CR3T@host/", "401 p%40K3PTS3CR3T"),
        ("https://host/x?token=K3PTS3CR3T&y=1", "403 for K3PTS3CR3T"),
    ],
)
def test_a_secret_of_an_address_is_known_in_what_a_library_says(address: str, text: str) -> None:
    keep_secret(address)
    assert "K3PT" not in safe_line(text)


def test_a_source_s_name_holds_none_and_is_utf8() -> None:
    """It is written into the manifest."""
    keep_secret("s3://AKIA:K3PTS3CR3T@bucket")
    assert Origin("remote", "r1-K3PTS3CR3T").name == "r1-***"
    assert Origin("folder", "mod\udcffel\n").name == "mod\\udcffel\n"
