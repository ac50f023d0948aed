"""Amounts in Kubernetes' spelling."""

import pytest

from runtime.quantities import read_bytes, show_bytes


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("20Gi", 20 << 30),
        ("1.5Mi", 3 << 19),
        ("20G", 20 * 10**9),
        ("500k", 500_000),
        ("2e3", 2000),
        (".5Ki", 512),
        (4096, 4096),
        (" 7 ", 7),
    ],
)
def test_bytes_are_read_as_kubernetes_writes_them(written: object, count: int) -> None:
    assert read_bytes(written) == count


@pytest.mark.parametrize(
    "written", ["", "20GB", "20 Gi", "500m", "0", "-1", "1e99", "9" * 50, True, None, "1e999999999", "٣Gi"]
)
def test_what_is_no_number_of_bytes_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="expected bytes"):
        read_bytes(written)


def test_bytes_are_shown_rounded() -> None:
    assert [show_bytes(count) for count in (12, 1536, 5 << 19, 3 << 30)] == [
        "12 bytes",
        "1.5 KiB",
        "2.5 MiB",
        "3.0 GiB",
    ]
