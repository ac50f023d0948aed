"""Secrets are cut out of text, in every form that other programs write them in, and nothing else is."""

import pytest

from runtime.redaction import redact
from tests.costs import assert_linear

SECRETS = [
    "get https://a.blob/x.parquet?sv=1&sig=SECRET%2Babc next",
    "get https://bucket/x?X-Amz-Signature=SECRETabc",
    "GET HTTPS://H/X?SIG=SECRET",
    'open https://h/path?x="SECRET"',
    "see https://h/x#access_token=SECRET",
    "next of http://h/x?a=b c?sig=SECRET",
    "//h/x?sig=SECRET",
    "h/x?y=1&sig=SECRET&z=2",
    "proxy http://user:SECRETpw@proxy:3128/",
    "https://user:SEC/RET@h/x",
    "https://user:SE@CRET@h/x",
    "postgres://u:SECRET@h",
    "a,https://h/x,https://u:SECRET@h/y",
    "Authorization: Bearer SECRETSECRETabc",
    "proxy-authorization: basic SECRET",
    "Authorization: Token SECRETSECRET",
    '{"Authorization": "SECRETSECRET"}',
    "sent Bearer SECRET",
    "bearer 12SECRET.abc",
    "password=SECRET",
    "password: SECRET",
    '{"password": "SECRET and more"}',
    r'"{\"password\": \"SECRET\"}"',
    "{'refresh_token': 'SECRETSECRET'}",
    '{"token":"SECRETSECRET"}',
    "?token=SECRETSECRET",
    "api_key=SECRET",
    "api-key=SECRET",
    "aws_secret_access_key=SECRET/abc+",
    "client_secret=SECRET",
    "HF_TOKEN=SECRETabcdef",
    "AccountName=x;AccountKey=SECRETSECRET==;EndpointSuffix=x",
    "SharedAccessSignature=SECRET",
    "SharedAccessSignature sv=1&sig=SECRET",
    "X-Amz-Signature=SECRET",
    "token hf_SECRETabcdefgh1234 used",
    "sk-SECRETSECRETSECRET",
    "sk-proj-aSEC-bRETSECRET_xY",
    "sk-ant-api03-aSEC-dRET_123456789012",
    "sk-or-v1-0123456789abcdef0123456789abcdefSECRET",
    "ghp_SECRETSECRETSECRET1234",
    "github_pat_SECRETSECRETSECRET",
    "glpat-SECRETSECRETSECRET",
    "AKIASECRETSECRETSECR",
    "xoxb-SECRETSECRET",
    "dckr_pat_SECRETSECRET",
    "AIzaSECRETSECRETSECRETSECRETSECRETSECRET",
    "jwt eyJhbGciOiJFUzI1NiJ9.SECRETiOjF9.abc",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_cut_out(text: str) -> None:
    shown = redact(text)
    assert not any(part in shown for part in ("SEC", "RET")), shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "fetched https://host:8443/data/train-00000.parquet (12 MB), 3 of 4; ask@example.org; a?b",
        "pulled https://host:5000/a@sha256:0123 and oci://host:5000/a@sha256:0123",
        "wrong or missing API key; send 'Authorization: Bearer KEY' or `x-api-key: KEY`",
        "--set api_key: a key must not stand on a command line",
        "a Bearer challenge without a realm; bearer first",
        "pad_token: <|endoftext|>, eos_token=</s>, max_tokens=400, token: 15, secret: push-secret",
        "docker run -v $PWD:/job",
        "/etc/passwd: leads out of the folder; column 'password': cells are no text; valid_token=300000000",
        "oci://name@sha256:0123",
        "adapters sk-learn-adapter-large-v2 and sk-llama-3.1-8b-instruct-support, SK-Learn-Adapter-Large-V2",
        "/data/hf_checkpoint/model.safetensors is damaged; hf_quantizer is None",
        "step 120/400, loss 1.234, lr=1e-4, signal=15, passed: 3, design=2",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        "http://a:",
        "http://a?",
        "a://",
        "://@",
        ":@/",
        'a="',
        'a=\\"',
        "authorization: ",
        "Bearer a.",
        "eyJaaaaaaaa.",
        "sk-",
        "-",
        "'",
    ],
)
def test_text_of_any_kind_takes_time_by_its_length(piece: str) -> None:
    """Eight times the text takes 64 times as long where each start is tried to the end."""
    texts = {size: piece * (size // len(piece)) for size in (10_000, 80_000)}
    assert_linear(lambda size: redact(texts[size]), *texts)
