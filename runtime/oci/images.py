"""Push and pull: a folder becomes an image, an image becomes a folder.

The same code serves registries and layouts on disk, behind `Store`. A tag is written after all blobs; a
folder appears complete or not at all. Does not know HTTP. Start at `push` and `pull`.
"""

import contextlib
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runtime.errors import RETRIABLE, CapacityError, ConfigError, Failure, RegistryError
from runtime.files import atomic_folder, check_folder, disk_errors, locked, temporary_folder
from runtime.oci import contents, manifests, signatures
from runtime.oci.access import DEFAULT, Access
from runtime.oci.blobs import Descriptor, file_digest, from_file
from runtime.oci.image import BaseImage, Image, build
from runtime.oci.keys import SigningKey, VerificationKey, read_public
from runtime.oci.layout import Layout
from runtime.oci.listing import MARKER
from runtime.oci.manifests import ImageManifest
from runtime.oci.progress import Progress
from runtime.oci.reference import Reference
from runtime.oci.store import Report, Store, StoredManifest, Watch

log = logging.getLogger(__name__)

_PARALLEL = 4
"""Blobs transferred at once; more only adds memory (one chunk buffer each) on one link."""


NOT_WATCHED = Watch()

_MOST_INDEXES = 4
"""Indexes inside each other."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image without pulling its files."""

    reference: Reference
    digest: str
    media_type: str
    manifest: ImageManifest
    named_digest: str
    """Of what the reference names itself: the image, or an index that holds it."""


def push(
    folder: Path,
    reference: Reference,
    *,
    files: Sequence[str] | None = None,
    annotations: Mapping[str, str] = {},
    access: Access = DEFAULT,
) -> str:
    """Push the files of `folder` as an image with them under /data; return its digest.

    files: paths relative to `folder`; every file below it when None.
    """
    with temporary_folder("push-") as scratch:
        return push_image(
            partial(build, folder, scratch, files=files, annotations=annotations), reference, access=access
        )


def push_image(
    build_image: Callable[[], Image],
    reference: Reference,
    *,
    access: Access = DEFAULT,
    mount_from: str | None = None,
    beside: Callable[[Store, Image], object] | None = None,
) -> str:
    """Push the image that `build_image` makes; return its digest. Nothing is sent when it is there.

    mount_from: a repository of the same registry that may hold some of the blobs already.
    beside: writes what belongs to the image into the same repository, before the tag names the image.
    """
    # Connecting to a registry takes about as long as hashing half a gigabyte.
    with ThreadPoolExecutor(1, thread_name_prefix="open") as pool:
        opened = pool.submit(open_store, reference, access)
        try:
            image = build_image()
        except BaseException:
            opened.add_done_callback(_close_unused)
            raise
    with closing(opened.result()) as store:
        if reference.digest and reference.digest != image.digest:
            raise ConfigError(f"{reference}: the image to push has digest {image.digest}; name it by a tag")
        _send(image, reference, store, mount_from=mount_from, beside=beside)
        return image.digest


def _send(
    image: Image,
    reference: Reference,
    store: Store,
    *,
    mount_from: str | None,
    beside: Callable[[Store, Image], object] | None,
) -> None:
    with store.writing():
        found = store.find(reference.selector)
        progress = Progress(f"push {reference}", image.size)
        if found is not None and found.digest == image.digest:
            progress.done("is there already, nothing to send")
            if beside is not None:
                beside(store, image)
            return
        with progress, ThreadPoolExecutor(_PARALLEL, thread_name_prefix="push") as pool:
            jobs = [pool.submit(store.put_blob, blob, progress.add, mount_from) for blob in image.blobs]
            _wait(jobs, pool, progress)
        if beside is not None:  # before the tag: who pulls by it finds a signed image
            beside(store, image)
        store.put_manifest(StoredManifest(image.manifest, image.media_type), reference.selector)
        progress.done(image.digest)


def pull(
    reference: Reference,
    folder: Path,
    *,
    access: Access = DEFAULT,
    watch: Watch = NOT_WATCHED,
) -> Path:
    """Make `folder` the verified content of the image; it appears complete or stays as it was.

    watch: asked on the way; what it raises ends the pull.
    A folder that an earlier pull of the same image made is kept; one with other files in it is refused.
    Signatures that `access` requires are checked before anything of the image is fetched.
    Interrupted downloads resume; a pull that fails for good leaves nothing.
    """
    with disk_errors(folder):
        _check_target(folder)
        if access.cache is not None:
            check_folder(access.cache, "a folder for the cache")
    with closing(open_store(reference, access)) as store:
        info = _trusted(store, reference, access)
        folder = folder.absolute()
        if _pulled_digest(folder) == info.digest and not _parts(folder).exists():
            return folder
        watch.image(info.manifest.size)
        with disk_errors(folder.parent), _new_folder(folder.parent), _locked(folder.parent, access.cache):
            if _pulled_digest(folder) != info.digest:  # else another process was quicker
                _pull(store, info, folder, access.cache, watch)
            shutil.rmtree(_parts(folder), ignore_errors=True)  # also of a pull that was killed just here
        return folder


def _pull(store: Store, info: ImageInfo, folder: Path, cache: Path | None, watch: Watch) -> None:
    blobs_dir = cache or _parts(folder)
    where = str(info.reference)
    try:
        with disk_errors(folder.parent):
            blobs_dir.mkdir(parents=True, exist_ok=True)
            _check_space(info.manifest, blobs_dir, folder.parent)
            blobs = _download(store, info, blobs_dir, watch)
            with atomic_folder(folder) as new:
                contents.unpack(info.manifest, blobs, new, where, check_size=watch.files)
                marker = {"reference": where, "digest": info.digest}
                (new / MARKER).write_text(json.dumps(marker), encoding="utf-8")
    except Failure as error:
        if type(error) not in RETRIABLE:  # after those the next try continues
            shutil.rmtree(_parts(folder), ignore_errors=True)
        raise


def _parts(folder: Path) -> Path:
    """Return where blobs lie until `folder` is made of them, where there is no cache."""
    return folder.parent / f".{folder.name}.blobs"


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and the ones above it; those made here that are empty go when the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _locked(parent: Path, cache: Path | None) -> Iterator[None]:
    """Keep other processes (ranks) from pulling below `parent`, or through `cache`, meanwhile."""
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    folders = {path.resolve() for path in (parent, cache) if path is not None}
    with contextlib.ExitStack() as stack:
        for folder in sorted(folders):  # one order for all, so that no two processes wait for each other
            waiting = f"another process pulls into {folder}: waiting for it"
            stack.enter_context(locked(folder, waiting=waiting))
        yield


def download(reference: Reference, folder: Path, access: Access = DEFAULT) -> tuple[ImageInfo, list[Path]]:
    """Download an image's blobs as they are stored; return the files of the layers and, last, the config."""
    with closing(open_store(reference, access)) as store:
        info = _trusted(store, reference, access)
        return info, _download(store, info, folder)


def load_base(reference: Reference, scratch: Path, access: Access) -> BaseImage:
    """Return the image to put files on, its layers downloaded to `scratch` as they are stored.

    A base with a shell (busybox) serves old controllers, which run `cp -r /data/*` inside the image.
    """
    info, blobs = download(reference, scratch, access)
    if info.manifest.kind != "image":
        raise ConfigError(f"{reference}: an artifact, expected an image to put files on")
    if len(manifests.diff_ids(blobs[-1], str(reference))) != len(info.manifest.layers):
        raise ConfigError(f"{reference}: its configuration names no diff_ids; choose another base image")
    config: dict[str, Any] = json.loads(blobs[-1].read_bytes())
    layers = [
        from_file(path, Descriptor(_oci_type(layer.media_type), layer.digest, layer.size))
        for layer, path in zip(info.manifest.layers, blobs, strict=False)
    ]
    return BaseImage(config, tuple(layers), str(reference), info.digest)


def check_push(reference: Reference, *, access: Access = DEFAULT, replaces: bool = False) -> None:
    """Prove that a push to `reference` works, leaving nothing behind; warn when the tag exists.

    replaces: the tag is one that is written again and again.
    """
    with closing(open_store(reference, access)) as store:
        store.check_writable()
        found = None if replaces else store.find(reference.selector)
        if found is not None:
            log.warning(
                "%s exists (%s): the push will replace it, or fail where tags cannot be changed; another tag"
                " keeps both",
                reference,
                found.digest,
            )


def inspect(reference: Reference, access: Access = DEFAULT) -> ImageInfo:
    """Return what `reference` names; RegistryError when there is no such image."""
    with closing(open_store(reference, access)) as store:
        return _inspect(store, reference)


def verify(
    reference: Reference,
    digest: str,
    keys: Sequence[str],
    *,
    index: str | None = None,
    access: Access = DEFAULT,
) -> VerificationKey:
    """Return the one of `keys` that has signed the image `digest` of the reference's repository.

    keys: files or PEM text. index: digest of an index that holds the image, and may be signed instead.
    RegistryError when it is not signed, or by another key, or when the signature is
    for another image or repository; ConfigError for a key that is none.
    """
    known = read_keys(keys)
    with closing(open_store(reference, access)) as store:
        return signatures.require(store, reference, [*filter(None, (index,)), digest], known)


def read_keys(keys: Sequence[str]) -> tuple[VerificationKey, ...]:
    """Return the public keys, files or PEM text; ConfigError for one that is none."""
    return tuple(map(read_public, keys))


def sign(reference: Reference, digest: str, key: SigningKey, *, access: Access = DEFAULT) -> None:
    """Sign the image `digest` of the reference's repository, beside the signatures that it has."""
    with closing(open_store(reference, access)) as store, store.writing():
        signatures.sign(store, reference, digest, key)


def find_digest(reference: Reference, access: Access = DEFAULT) -> str | None:
    """Return the digest that a tag names in its registry now, None when there is no such tag or repository.

    Asks for no manifest. RegistryError where access is denied, TransientError where nothing answers.
    """
    from runtime.oci.repository import Repository  # imports requests and oras: a fifth of a second

    with closing(Repository(reference, access)) as repository:
        return repository.digest_of(reference.selector)


def open_store(reference: Reference, access: Access) -> Store:
    """Return the registry repository or layout that `reference` names."""
    if reference.layout is not None:
        return Layout(reference.layout)
    from runtime.oci.repository import Repository  # imports requests and oras: a fifth of a second

    return Repository(reference, access)


def _close_unused(opened: Future[Store]) -> None:
    if opened.exception() is None:
        opened.result().close()


def _trusted(store: Store, reference: Reference, access: Access) -> ImageInfo:
    """Return what `reference` names, signed as `access` requires."""
    keys = read_keys(access.required_keys)
    info = _inspect(store, reference)
    if keys:
        signatures.require(store, reference, [info.named_digest, info.digest], keys)
    return info


def _inspect(store: Store, reference: Reference) -> ImageInfo:
    manifest = named = _find(store, reference, reference.selector)
    depth = 0
    while manifests.is_index(manifest):
        depth += 1
        if depth > _MOST_INDEXES:
            raise RegistryError(f"{reference}: more than {_MOST_INDEXES} indexes inside each other; refused")
        manifest = _find(store, reference, manifests.choose_platform(manifest, _machine(), str(reference)))
    found = manifests.read(manifest, str(reference))
    return ImageInfo(reference, manifest.digest, manifest.media_type, found, named.digest)


def _find(store: Store, reference: Reference, selector: str) -> StoredManifest:
    manifest = store.find(selector)
    if manifest is None and isinstance(store, Layout) and reference.tag is None and reference.digest is None:
        manifest = store.find_only()
    if manifest is None:
        raise RegistryError(f"{reference}: no such image; check the name and the tag, or push it first")
    return manifest


def _machine() -> str:
    """Return this machine's architecture as images name it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _download(store: Store, info: ImageInfo, folder: Path, watch: Watch = NOT_WATCHED) -> list[Path]:
    """Return the verified files of all layers and, last, of the config."""
    wanted = [*info.manifest.layers, info.manifest.config]
    progress = Progress(f"pull {info.reference}", sum(each.size for each in wanted))

    def report(count: int) -> None:
        watch.chunk()
        progress.add(count)

    distinct = {each.digest: each for each in wanted}
    with progress, ThreadPoolExecutor(_PARALLEL, thread_name_prefix="pull") as pool:
        jobs = [pool.submit(_fetch, store, each, folder, report) for each in distinct.values()]
        _wait(jobs, pool, progress)
    progress.done(info.digest)
    return [folder / each.digest.removeprefix("sha256:") for each in wanted]


def _fetch(store: Store, descriptor: Descriptor, folder: Path, report: Report) -> None:
    path = folder / descriptor.digest.removeprefix("sha256:")
    if path.is_file() and path.stat().st_size == descriptor.size and file_digest(path) == descriptor.digest:
        report(descriptor.size)
        return
    store.fetch(descriptor, path, report)


def _wait(jobs: Sequence[Future[None]], pool: ThreadPoolExecutor, progress: Progress) -> None:
    """Wait for all jobs; a failure of one, or SIGTERM meanwhile, cancels the others."""
    try:
        finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in finished:
            job.result()
    except BaseException:
        progress.cancel()
        pool.shutdown(cancel_futures=True)
        raise


def _check_target(folder: Path) -> None:
    check_folder(folder, "a folder to pull into")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ConfigError(f"{folder}: holds other files; pull into a new or empty folder")


def _pulled_digest(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_space(manifest: ImageManifest, blobs: Path, target: Path) -> None:
    """Raise CapacityError when blobs and files cannot both fit; files are no smaller than their blobs."""
    for folder, needed in ((blobs, manifest.size), (target, 2 * manifest.size)):
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CapacityError(
                f"{folder}: pulling needs {needed} bytes and {free} are free; free space or use another disk"
            )


def _oci_type(media_type: str) -> str:
    """Name a Docker layer's type as OCI does: one manifest holds one kind."""
    docker = "application/vnd.docker.image.rootfs.diff.tar"
    return media_type.replace(docker, "application/vnd.oci.image.layer.v1.tar").replace(
        "tar.gzip", "tar+gzip"
    )
