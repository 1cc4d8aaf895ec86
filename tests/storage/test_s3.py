"""What an S3 store does when requests are lost, refused, slow or cut short."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import CredentialRetrievalError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from batchinfer.errors import ConfigError, TransientError
from batchinfer.storage import S3Options, Store, open_store, retry
from batchinfer.storage.s3_client import S3Client
from batchinfer.storage.s3_files import FIRST_READ_BYTES, MAX_READ_AHEAD_BYTES, part_bytes
from tests.support.fault_proxy import Action, FaultProxy, Rule, fault_proxy
from tests.support.s3_server import S3Server, s3_server

pytestmark = pytest.mark.s3

MIB = 1024 * 1024

BOUNDED_PUBLISHER = """
import pathlib, sys
from batchinfer.storage import open_store

def peak_bytes():  # ru_maxrss starts at what the parent had
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def write(file):
    for _ in range(96):
        file.write(bytes(1024 * 1024))

store = open_store(sys.argv[1])
store.put("warm", bytes(1024 * 1024))
before = peak_bytes()
store.publish("shard.parquet", write)
print(peak_bytes() - before)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture(scope="module")
def shared_proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.url) as started:
        yield started


@pytest.fixture
def proxy(
    server: S3Server, shared_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> FaultProxy:
    """A proxy without rules, which is what the AWS environment leads to."""
    for name, value in server.environment(shared_proxy.url).items():
        monkeypatch.setenv(name, value)
    shared_proxy.reset()
    return shared_proxy


@pytest.fixture
def store(server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.02)
    opened = open_store(f"s3://{server.create_bucket()}/prefix", retry_s=5)
    yield opened
    opened.close()


@contextmanager
def tls_server(folder: Path) -> Iterator[str]:
    """The address of a server that does TLS with a certificate of its own, and then nothing."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # closed: the test is over
                    return
                with connection, contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def write_20_mib(file: BinaryIO) -> None:
    for _ in range(20):
        file.write(bytes(MIB))


@pytest.mark.parametrize(
    "fault",
    [
        Rule("lose_reply"),
        Rule("refuse"),
        Rule("status", status=503, code="SlowDown"),
        Rule("status", status=500, code="InternalError"),
        Rule("status", status=429, code="TooManyRequests"),
    ],
    ids=lambda rule: f"{rule.action} {rule.code}",
)
def test_each_request_survives_a_passing_fault(
    store: Store, proxy: FaultProxy, fault: Rule
) -> None:
    def survives(call: Callable[[], object]) -> object:
        # Twice, because aiohttp itself tries a request again on a connection found closed.
        proxy.reset(Rule(fault.action, status=fault.status, code=fault.code, times=2))
        result = call()
        assert proxy.rules[0].times == 0
        return result

    assert survives(lambda: store.create("lease", b"mine")) is True
    survives(lambda: store.put("a", b"content"))
    assert survives(lambda: store.read("a")) == b"content"
    assert survives(lambda: [found.key for found in store.list()]) == ["a", "lease"]
    assert survives(lambda: store.stat("a")) == next(store.list("a"))
    survives(lambda: store.delete(["a", "lease"]))
    assert list(store.list()) == []


@pytest.mark.parametrize("fault", ["lose_reply", "refuse", "status"])
def test_every_request_of_an_upload_survives_a_passing_fault(
    store: Store, proxy: FaultProxy, fault: Action
) -> None:
    begin, part = Rule(fault, "POST", query="uploads"), Rule(fault, "PUT", query="partNumber=1")
    proxy.reset(begin, part, Rule(fault, "POST", query="uploadId"))
    store.publish("shard.parquet", write_20_mib)
    assert [rule.times for rule in proxy.rules] == [0, 0, 0]
    assert store.read("shard.parquet") == bytes(20 * MIB)


def test_an_upload_completed_with_its_reply_lost_is_recognised(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.reset(
        Rule("lose_reply", "POST", query="uploadId"),
        Rule("status", "POST", query="uploadId", status=404, code="NoSuchUpload"),
    )
    store.publish("shard.parquet", write_20_mib)
    assert proxy.num_seen("HEAD", "shard.parquet") == 1
    assert proxy.num_seen("DELETE") == 0


def test_an_upload_that_somebody_aborted_is_not_taken_for_done(
    store: Store, proxy: FaultProxy
) -> None:
    store.publish("shard.parquet", write_20_mib)  # the same bytes, from somebody else
    proxy.reset(Rule("status", "POST", query="uploadId", status=404, code="NoSuchUpload"))
    with pytest.raises(TransientError, match="its upload was aborted"):
        store.publish("shard.parquet", write_20_mib)


def test_a_failed_upload_is_aborted_or_swept(store: Store, proxy: FaultProxy) -> None:
    proxy.reset(Rule("status", "PUT", status=403, code="AccessDenied"))
    with pytest.raises(ConfigError):
        store.publish("shard.parquet", write_20_mib)
    assert store.sweep(lambda key: True) == 0
    proxy.reset(
        Rule("status", "PUT", status=403, code="AccessDenied"), Rule("status", "DELETE", times=1)
    )
    with pytest.raises(ConfigError):
        store.publish("shard.parquet", write_20_mib)
    assert store.sweep(lambda key: key == "shard.parquet") == 1
    assert list(store.list()) == []


def test_a_sweep_that_is_not_permitted_does_not_end_the_run(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.reset(Rule("status", "GET", query="uploads", status=403, code="AccessDenied"))
    assert store.sweep(lambda key: True) == 0


def test_a_small_file_is_one_request(store: Store, proxy: FaultProxy) -> None:
    def write(file: BinaryIO) -> None:
        file.write(bytes(16 * MIB))

    store.publish("part", write)
    assert [request.method for request in proxy.seen] == ["PUT"]
    store.publish("empty", lambda file: None)
    assert store.read("empty") == b""


def test_ten_thousand_parts_hold_the_largest_object() -> None:
    assert sum(map(part_bytes, range(10_000))) > 5 * 1024**4
    assert max(part_bytes(number) for number in range(8_500)) <= 5 * 1024**3


def test_publishing_holds_two_parts_and_not_the_file(server: S3Server, proxy: FaultProxy) -> None:
    url = f"s3://{server.create_bucket()}"
    publisher = [sys.executable, "-c", BOUNDED_PUBLISHER, url]
    grown_bytes = int(subprocess.run(publisher, stdout=subprocess.PIPE, check=True).stdout)
    assert grown_bytes < 60 * MIB
    found = open_store(url).stat("shard.parquet")
    assert found and found.size_bytes == 96 * MIB


def test_a_conflict_is_tried_again_and_a_lost_race_is_not(store: Store, proxy: FaultProxy) -> None:
    conflict = Rule("status", "PUT", status=409, code="ConditionalRequestConflict")
    proxy.reset(conflict, Rule("status", "PUT", status=400, code="RequestTimeout"))
    assert store.create("lease", b"mine")
    assert proxy.num_seen("PUT") == 3
    proxy.reset()
    assert not store.create("lease", b"theirs")
    assert [request.method for request in proxy.seen] == ["PUT", "GET"]


def test_a_key_that_was_taken_and_deleted_again_is_not_ours(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.reset(Rule("status", "PUT", status=412, code="PreconditionFailed"))
    assert not store.create("lease", b"mine")


@pytest.mark.parametrize("status", [501, 400])
def test_a_store_without_conditional_create_is_found_out(
    store: Store, proxy: FaultProxy, status: int
) -> None:
    code = "NotImplemented" if status == 501 else "InvalidArgument"
    proxy.reset(Rule("status", "PUT", status=status, code=code, times=None))
    with pytest.raises(ConfigError, match=r"output\.single_writer"):
        store.create("lease", b"mine")
    assert not store.supports_create("probe")


def test_a_truncated_answer_is_read_again(store: Store, proxy: FaultProxy) -> None:
    content = bytes(range(256)) * 4096
    store.put("shard.parquet", content)
    proxy.reset(Rule("truncate", "GET", "shard"))
    assert store.read("shard.parquet") == content
    proxy.reset(Rule("truncate", "GET", "shard"))
    with store.open("shard.parquet") as file:
        assert file.read() == content
    assert proxy.num_seen("GET", "shard") == 2


def test_sequential_reading_takes_few_requests_and_a_jump_a_small_one(
    store: Store, proxy: FaultProxy
) -> None:
    content = b"".join(number.to_bytes(4, "little") for number in range(3 * MIB))
    store.put("x", content)
    proxy.reset()
    with store.open("x") as file:
        read = bytearray()
        while piece := file.read(50_000):
            read += piece
    assert read == content
    num_largest = len(content) // MAX_READ_AHEAD_BYTES
    assert proxy.num_seen("GET") <= num_largest + 4
    proxy.reset()
    with store.open("x") as file:
        file.seek(-FIRST_READ_BYTES, 2)
        assert file.read(FIRST_READ_BYTES) == content[-FIRST_READ_BYTES:]
        file.seek(5 * MIB)
        assert file.read(100) + file.read(100) == content[5 * MIB : 5 * MIB + 200]
    assert proxy.num_seen("GET") == 2


def test_a_parquet_footer_costs_one_request(store: Store, proxy: FaultProxy) -> None:
    table = pa.table({"row": range(200_000)})
    store.publish("x", lambda file: pq.write_table(table, file))
    proxy.reset()
    with store.open("x") as file:
        assert pq.read_metadata(file).num_rows == 200_000
    assert [request.method for request in proxy.seen] == ["HEAD", "GET"]


def test_a_file_replaced_under_its_reader_is_not_mixed(store: Store) -> None:
    store.put("x", b"a" * MIB)
    with store.open("x") as file:
        file.read(10)
        store.put("x", b"b" * MIB)
        with pytest.raises(TransientError, match="was replaced while it was read"):
            file.read()
    store.put("x", b"c" * MIB)
    with store.open("x") as file:
        store.delete(["x"])
        with pytest.raises(FileNotFoundError):
            file.read()


def test_a_listing_goes_over_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(MOTO_S3_DEFAULT_MAX_KEYS="2") as server, fault_proxy(server.url) as proxy:
        for name, value in server.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        store = open_store(f"s3://{server.create_bucket()}/prefix", retry_s=5)
        for number in range(5):
            store.put(f"a/{number}", b"")
        store.put("folder marker/", b"")
        proxy.reset(Rule("status", "GET", skip=1))
        assert [found.key for found in store.list()] == [f"a/{number}" for number in range(5)]
        assert proxy.num_seen("GET") >= 4
        store.close()


def test_deleting_goes_in_batches_and_asks_again_for_what_failed(
    store: Store, proxy: FaultProxy
) -> None:
    store.put("x", b"")
    proxy.reset()
    store.delete([f"absent/{number}" for number in range(1500)] + ["x"])
    assert proxy.num_seen("POST", query="delete") == 2
    assert store.stat("x") is None


def test_a_store_that_is_down_is_given_up_within_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    store = open_store(
        "s3://bucket/x", s3=S3Options(endpoint_url=endpoint, anonymous=True), retry_s=1
    )
    started_s = time.monotonic()
    with pytest.raises(TransientError, match=r"write s3://bucket/x/k failed \d+ times in"):
        store.put("k", b"")
    assert time.monotonic() - started_s < 2


def test_a_stop_request_ends_the_waiting_immediately(server: S3Server, proxy: FaultProxy) -> None:
    stop = threading.Event()
    store = open_store("s3://bucket/x", should_stop=stop.is_set, retry_s=60)
    proxy.reset(Rule("status", times=None))
    threading.Timer(0.5, stop.set).start()
    started_s = time.monotonic()
    with pytest.raises(TransientError, match="asked to stop"):
        store.put("k", b"")
    assert time.monotonic() - started_s < 2
    proxy.reset()
    with pytest.raises(ConfigError):  # an answer: the first try is made even now
        store.put("k", b"")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidAccessKeyId", "credentials refused"),
        (403, "SignatureDoesNotMatch", "credentials refused"),
        (400, "ExpiredToken", "credentials have expired"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (403, "AccessDenied", "access denied.*requester_pays.*server_side_encryption"),
    ],
)
def test_refused_credentials_are_named_and_not_tried_again(
    store: Store, proxy: FaultProxy, status: int, code: str, words: str
) -> None:
    proxy.reset(Rule("status", status=status, code=code, times=None))
    calls: list[Callable[[], object]] = [
        lambda: store.put("k", b""),
        lambda: list(store.list()),
        lambda: store.read("k"),
        lambda: store.create("k", b""),
        lambda: store.delete(["k"]),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=words) as caught:
            call()
        assert code in str(caught.value)
        assert "AWS_PROFILE" in str(caught.value)
    assert len(proxy.seen) == len(calls)


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed"])
def test_credentials_that_were_accepted_before_are_a_reason_to_start_again(
    store: Store, proxy: FaultProxy, code: str
) -> None:
    """Also where a HEAD, whose answer has no code, is the first to be refused."""
    with pytest.raises(FileNotFoundError):  # refused, but not who asked
        store.read("k")
    proxy.reset(Rule("status", status=400, code=code, times=None))
    for call in (lambda: store.stat("k"), lambda: store.put("k", b""), lambda: list(store.list())):
        with pytest.raises(TransientError, match=f"since the run began.*{code}.*start again"):
            call()


HTML = "<html><body>Welcome</body></html>"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            Rule("status", status=404, body='{"error":"not found"}'),
            "not answer like an S3 server.*endpoint_url",
        ),
        (
            Rule("status", status=404, code="NoSuchKey"),
            "not answer like an S3 server.*endpoint_url",
        ),
        (Rule("status", status=405, body=HTML), "not answer like an S3 server.*endpoint_url"),
        (Rule("status", status=200, body=HTML), "not answer like an S3 server.*endpoint_url"),
        (
            Rule("status", status=200, body="plain text"),
            "not answer like an S3 server.*endpoint_url",
        ),
        (Rule("status", status=403, body=HTML), "access denied"),
        (Rule("status", status=403, code="SecondLevelDomainForbidden"), "addressing_style"),
        (Rule("status", status=301, code="PermanentRedirect"), r"s3\.region"),
        (Rule("status", status=400, code="AuthorizationHeaderMalformed"), r"s3\.region"),
        (Rule("status", status=411, code="MissingContentLength"), "store refused"),
    ],
    ids=lambda value: f"{value.status} {value.body or value.code}" if type(value) is Rule else "",
)
def test_an_endpoint_that_answers_otherwise_is_named_with_what_to_do(
    store: Store, proxy: FaultProxy, rule: Rule, words: str
) -> None:
    rule.times = None
    proxy.reset(rule)
    with pytest.raises(ConfigError, match=words):
        list(store.list())
    with pytest.raises(ConfigError, match=words):
        store.put("k", b"what a web server would take with 200")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.0 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
    ],
    ids=["no HTTP", "a HEAD with a body"],
)
def test_a_server_of_another_protocol_is_distinguished_from_one_that_is_down(
    monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy, answer: bytes
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # closed: the test is over
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        opened = open_store("s3://bucket/x", s3=S3Options(endpoint_url=endpoint), retry_s=20)
        for call in (lambda: opened.stat("k"), lambda: list(opened.list())):
            with pytest.raises(ConfigError, match="not answer like an S3 server"):
                call()
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("body", ["", "<ListBucketResult><Contents><Key>half", "garbage", HTML])
def test_a_garbled_answer_of_a_store_that_is_known_is_asked_for_again(
    store: Store, proxy: FaultProxy, body: str
) -> None:
    store.put("k", b"content")
    proxy.reset(
        Rule("status", "GET", query="list-type", status=200, body=body, times=4),
        Rule("status", "PUT", status=200, body=body, times=0),
    )
    assert [found.key for found in store.list()] == ["k"]


def test_an_upload_completed_with_an_error_is_retried(store: Store, proxy: FaultProxy) -> None:
    """An upload that is completed with an error in the answer is completed again."""
    error = "<Error><Code>InternalError</Code><Message>later</Message></Error>"
    proxy.reset(Rule("status", "POST", query="uploadId", status=200, body=error, times=2))
    store.publish("shard.parquet", write_20_mib)
    assert store.read("shard.parquet") == bytes(20 * MIB)


@pytest.mark.parametrize(("status", "code"), [(403, "QuotaExceeded"), (507, "StorageFull")])
def test_a_full_store_is_a_reason_to_try_again_later(
    store: Store, proxy: FaultProxy, status: int, code: str
) -> None:
    proxy.reset(Rule("status", "PUT", status=status, code=code, times=None))
    with pytest.raises(TransientError, match="store is full"):
        store.put("k", b"")


def test_a_bucket_gets_the_headers_that_it_demands(server: S3Server, proxy: FaultProxy) -> None:
    """A reader that pays with every request; encryption with each request that begins an object."""
    url = f"s3://{server.create_bucket()}/p"
    denied = {"status": 403, "code": "AccessDenied", "times": None}
    proxy.reset(
        Rule("status", lacks="(?i)x-amz-request-payer: requester", **denied),
        Rule("status", "PUT", query="^(?!.*partNumber)", lacks="encryption: aws:kms", **denied),
        Rule("status", "POST", query="uploads", lacks="aws-kms-key-id: key-1", **denied),
    )
    options = S3Options(requester_pays=True, server_side_encryption="aws:kms", kms_key_id="key-1")
    opened = open_store(url, s3=options, retry_s=5)
    assert opened.create("a", b"content")
    opened.publish("b", write_20_mib)
    assert [found.key for found in opened.list()] == ["a", "b"]
    assert opened.read("a") == b"content"
    opened.delete(["a", "b"])
    with pytest.raises(ConfigError, match=r"requester_pays.*server_side_encryption"):
        open_store(url, retry_s=5).read("a")
    opened.close()


def test_a_head_without_permission_is_not_taken_for_absence(
    store: Store, proxy: FaultProxy
) -> None:
    proxy.reset(Rule("status", "HEAD|GET", status=403, code="AccessDenied", times=None))
    with pytest.raises(ConfigError, match="access denied"):
        store.stat("k")


def test_missing_credentials_and_profiles_are_named(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"credentials missing .*nobody"):
        open_store("s3://bucket", s3=S3Options(profile="nobody")).put("k", b"")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=r"credentials missing .*AWS_PROFILE"):
        open_store("s3://bucket").put("k", b"")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "test\n"}, "AWS_ACCESS_KEY_ID contains a newline"),
        ({"AWS_SESSION_TOKEN": "a\rb"}, "AWS_SESSION_TOKEN contains a newline"),
        ({"AWS_DEFAULT_REGION": "us-east-1\n"}, "AWS_DEFAULT_REGION contains a newline"),
        ({"AWS_METADATA_SERVICE_TIMEOUT": "soon"}, "AWS_METADATA_SERVICE_TIMEOUT"),
        ({"AWS_CA_BUNDLE": "/no/ca.pem"}, r"/no/ca\.pem, .* AWS_CA_BUNDLE names: No such file"),
        ({"AWS_CA_BUNDLE": "/etc"}, "AWS_CA_BUNDLE names: Is a directory"),
        ({"http_proxy": "a\nb"}, "HTTP_PROXY"),
        (
            {
                "AWS_ACCESS_KEY_ID": "",
                "AWS_ROLE_ARN": "arn:aws:iam::1:role/r",
                "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token",
            },
            "cannot read /no/token",
        ),
    ],
)
def test_a_variable_that_prevents_all_requests_is_named_immediately(
    environ: dict[str, str], words: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    opened = open_store("s3://bucket/x", retry_s=60)
    for call in (lambda: opened.put("k", b""), lambda: opened.read("k")):
        with pytest.raises(ConfigError, match=words):
            call()
    assert not proxy.seen


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("s3 = yes", "`s3 =` of profile default in .*config .AWS_CONFIG_FILE.*indented lines"),
        (
            "credential_process = /bin/false",
            "credential_process of profile default .* said nothing",
        ),
        (
            "credential_process = sh -c 'echo vault is sealed >&2; exit 1'",
            "failed: vault is sealed",
        ),
        ("credential_process = echo hello", "credential_process of .* does not print JSON"),
        ("credential_process = echo 1", "credential_process of .* prints JSON that has no cred"),
        ("credential_process = echo '[]'", "credential_process of .* prints JSON that has no cred"),
        ("credential_process = echo '{\"Version\": 1}'", "credential_process .*AccessKeyId"),
        (
            "role_arn = arn:aws:iam::1:role/r\ncredential_source = Environment",
            "profile default in .*config .*gives no credentials",
        ),
    ],
)
def test_a_configuration_line_that_prevents_a_client_is_named_immediately(
    lines: str, words: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "default")
    if "s3" not in lines:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "config").write_text(f"[default]\n{lines}\n")
    opened = open_store("s3://bucket/x", retry_s=60)
    for call in (lambda: opened.put("k", b""), lambda: opened.read("k")):
        with pytest.raises(ConfigError, match=words):
            call()
    assert not proxy.seen


@pytest.mark.parametrize("provider", ["custom-process", "container-role"])
def test_a_provider_of_credentials_that_fails_during_a_run_is_waited_for(
    provider: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("k", b"content")
    num_failing = 0
    request = S3Client._request

    async def failing(self: S3Client, *arguments: Any) -> dict[str, Any]:
        nonlocal num_failing
        if num_failing > 0:
            num_failing -= 1
            raise CredentialRetrievalError(provider=provider, error_msg="sealed")
        return await request(self, *arguments)

    monkeypatch.setattr(S3Client, "_request", failing)
    num_failing = 2
    assert store.read("k") == b"content"
    num_failing = 1_000_000
    with pytest.raises(TransientError, match="sealed"):
        store.read("k")


@pytest.mark.parametrize("printed", ["1", "[]", '"sealed"', "sealed", "{}"])
def test_a_program_that_prints_no_credentials_during_a_run_is_waited_for(
    printed: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it printed first end soon, so it is asked again."""
    environ = server.environment()
    output, config = tmp_path / "credentials.json", tmp_path / "config"
    good = {
        "Version": 1,
        "AccessKeyId": environ.pop("AWS_ACCESS_KEY_ID"),
        "SecretAccessKey": environ.pop("AWS_SECRET_ACCESS_KEY"),
        "SessionToken": "token",
        "Expiration": (datetime.now(UTC) + timedelta(seconds=30)).isoformat(),
    }
    output.write_text(json.dumps(good))
    config.write_text(f"[default]\ncredential_process = cat {output}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environ | {"AWS_CONFIG_FILE": str(config)}).items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{server.create_bucket()}/x", retry_s=1)
    store.put("k", b"content")
    output.write_text(printed)
    with pytest.raises(TransientError, match="credential_process of profile default"):
        store.read("k")
    output.write_text(json.dumps(good))
    assert store.read("k") == b"content"


def test_refused_credentials_name_a_variable_that_ends_in_a_newline(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test\n")
    proxy.reset(Rule("status", status=403, code="SignatureDoesNotMatch", times=None))
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY contains a newline"):
        store.put("k", b"")


@pytest.mark.parametrize("says", ["http", "https"])
def test_an_endpoint_with_the_wrong_scheme_is_refused_with_the_right_one(
    says: str, server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Also where the server, which waits for the other, only drops the connection."""
    address = server.url.removeprefix("http://")
    with tls_server(tmp_path) as tls_address:
        address = address if says == "https" else tls_address
        options = S3Options(endpoint_url=f"{says}://{address}")
        opened = open_store("s3://bucket/x", s3=options, retry_s=60)
        right = "http" if says == "https" else "https"
        with pytest.raises(ConfigError, match=rf"write {right}://.*AWS_ENDPOINT_URL"):
            opened.put("k", b"")
        opened.close()


def test_a_file_of_credentials_that_is_gone_for_a_moment_is_waited_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is concluded from it: to a reader, the error of a file that is not there looks like
    a key that is not there.
    """
    store.put("k", b"content")
    lost = [FileNotFoundError(2, "No such file", "/token"), OSError(24, "Too many open files")]
    request = S3Client._request

    async def failing(self: S3Client, *arguments: Any) -> dict[str, Any]:
        if lost:
            raise lost.pop()
        return await request(self, *arguments)

    monkeypatch.setattr(S3Client, "_request", failing)
    assert store.read("k") == b"content" and not lost


def test_anonymous_requests_are_sent_without_credentials(
    store: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    open_store(store.url, s3=S3Options(anonymous=True)).put("k", b"public")
    with pytest.raises(ConfigError, match="credentials missing"):
        open_store(store.url).put("k", b"signed")


def test_a_missing_bucket_is_named(proxy: FaultProxy) -> None:
    store = open_store("s3://no-such-bucket/x")
    for call in (lambda: list(store.list()), lambda: store.put("k", b""), lambda: store.read("k")):
        with pytest.raises(ConfigError, match=r"s3://no-such-bucket/x.*no such bucket"):
            call()
    assert store.stat("k") is None


def test_rules_can_be_set_from_another_process(store: Store, proxy: FaultProxy) -> None:
    rules = json.dumps([{"action": "status", "method": "PUT", "status": 403, "code": "Denied"}])
    control = f"{proxy.url}/__faults__"
    with urllib.request.urlopen(control, data=rules.encode(), timeout=5):
        pass
    with pytest.raises(ConfigError, match="Denied"):
        store.put("k", b"")
    with urllib.request.urlopen(control, timeout=5) as answer:
        assert [request["method"] for request in json.load(answer)] == ["PUT"]


def test_a_promised_single_writer_needs_no_conditional_create(
    proxy: FaultProxy, server: S3Server
) -> None:
    opened = open_store(f"s3://{server.create_bucket()}/p", retry_s=5, single_writer=True)
    assert opened.create("k", b"one")
    assert not opened.create("k", b"two")
    assert opened.create("k", b"one"), "a repeated create of our own"
    assert opened.read("k") == b"one"
    opened.close()
