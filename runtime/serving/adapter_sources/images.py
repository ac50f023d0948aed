"""Adapters as images in registries: a tag is looked up, its image pulled once, its files kept on disk.

Everything here blocks, and is called in threads. Start at `AdapterImages.pulled`.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime import adapters, oci
from runtime.errors import ConfigError, TransientError, UnknownModelError
from runtime.oci import AccessDeniedError, Reference
from runtime.quantities import show_bytes
from runtime.serving.adapter_sources.disk import AdapterFiles
from runtime.serving.settings import AdapterLimits

log = logging.getLogger(__name__)

LOOKUP_ATTEMPTS, LOOKUP_TIMEOUT_S = 2, 10.0
"""Of a look-up of a tag: a client waits for it, and asks again itself."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """A tag, and what it named when it was looked up."""

    reference: Reference
    digest: str


class AdapterImages:
    """The images below some sources, and the files of those that were pulled."""

    def __init__(self, files: AdapterFiles, limits: AdapterLimits, access: oci.Access) -> None:
        self._files, self._limits, self._access = files, limits, access
        self._quick = replace(
            access,
            attempts=LOOKUP_ATTEMPTS,
            connect_timeout_s=LOOKUP_TIMEOUT_S,
            read_timeout_s=LOOKUP_TIMEOUT_S,
        )

    def digest(self, reference: Reference) -> str | None:
        """Return what the tag names now; None where there is none. Raises as `oci.find_digest`."""
        return oci.find_digest(reference, self._quick)

    def find(self, references: Sequence[Reference]) -> FoundImage:
        """Return the first of `references` that is there.

        UnknownModelError where none is, AccessDeniedError where that may be for want of rights,
        TransientError where a registry does not answer.
        """
        denied = None
        for reference in references:
            try:
                digest = self.digest(reference)
            except AccessDeniedError as error:
                denied = error
                continue
            if digest is not None:
                return FoundImage(reference, digest)
        raise denied or UnknownModelError("no source has it")

    @contextlib.contextmanager
    def pulled(self, image: FoundImage) -> Iterator[Path]:
        """Yield the adapter's folder, pulled unless it is on disk; its files stay while the block runs.

        Raises ConfigError where it is no adapter or larger than the limits, RegistryError, TransientError or
        CapacityError where it cannot be pulled.
        """
        pinned = replace(image.reference, tag=None, digest=image.digest)
        with self._files.holding(image.digest) as folder:
            is_there = folder.is_dir()
            if not is_there or self._access.required_keys:  # it may be from a server that asked for none
                access = self._quick if is_there else self._access
                oci.pull(pinned, folder, access=access, watch=self._watch())
            yield adapters.within(folder, "adapter", "the image")

    def _watch(self) -> oci.Watch:
        until = time.monotonic() + self._limits.pull_s

        def check_size(size: int) -> None:
            if size > self._limits.image_bytes:
                raise ConfigError(
                    f"has {show_bytes(size)}, and adapter_limits.image_bytes allows "
                    f"{show_bytes(self._limits.image_bytes)}"
                )
            self._files.make_room(size)

        def check_time() -> None:
            if time.monotonic() > until:
                raise TransientError(f"not pulled within {self._limits.pull_s:g} s (adapter_limits.pull_s)")

        return oci.Watch(image=check_size, files=check_size, chunk=check_time)
