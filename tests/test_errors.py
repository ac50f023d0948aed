"""The error tree: one exit code and one HTTP status for every failure, listed or inherited."""

import errno

import pytest

from runtime import errors

DESIGNED = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.DivergedError: 4,
    errors.RegistryError: 5,
    errors.CapacityError: 6,
    errors.TransientError: 75,
    errors.StoppedError: 143,
}


@pytest.mark.parametrize(("kind", "code"), DESIGNED.items())
def test_exit_codes_are_the_published_ones(kind: type[errors.Failure], code: int) -> None:
    assert errors.exit_code(kind("x")) == code


def test_a_new_subclass_takes_the_code_and_status_of_its_ancestor() -> None:
    class MissingColumnError(errors.DataError):
        pass

    assert errors.exit_code(MissingColumnError("x")) == 3
    assert errors.http_status(MissingColumnError("x")) == 500


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert errors.is_out_of_memory(error) == expected


def test_request_errors_carry_the_field_at_fault() -> None:
    error = errors.UnknownModelError("no model x", param="model", code="model_not_found")
    assert (errors.http_status(error), error.param, error.code) == (404, "model", "model_not_found")
