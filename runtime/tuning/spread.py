"""One job's checkpoints on nodes that share no disk: rank 0 keeps them whole, and gives them out again.

Files travel through the process group; where all ranks see one disk, none does. Does not know what is in
a checkpoint. Start at `agreed`.
"""

import logging
import shutil
from pathlib import Path

from runtime.files import sha256
from runtime.tuning import checkpoints
from runtime.tuning.ranks import Ranks

log = logging.getLogger(__name__)

PIECE_BYTES = 32 * 2**20
"""How much of a file travels at once."""


def collect(checkpoint: Path, ranks: Ranks) -> None:
    """Bring what each rank wrote of `checkpoint` (its random state) to rank 0, before it is sealed there."""
    own = checkpoint / f"rng_state_{ranks.rank}.pth"
    for rank, content in enumerate(ranks.gathered(own.read_bytes() if own.is_file() else b"")):
        target = checkpoint / f"rng_state_{rank}.pth"
        if content and not target.exists():
            target.write_bytes(content)
    ranks.wait()
    if ranks.leads and not (checkpoint / "trainer_state.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)  # another disk than rank 0's: a stub


def agreed(folder: Path, ranks: Ranks) -> Path | None:
    """Return the newest whole checkpoint that rank 0 has below `folder`, once every node has it too."""
    chosen = checkpoints.newest(folder) if ranks.first else None
    name, digest = ranks.told((chosen.name, sha256(chosen / checkpoints.MANIFEST)) if chosen else ("", ""))
    if not name:
        return None
    target = folder / name
    lacking = ranks.leads and not _is_same(target, digest)
    if any(ranks.told(ranks.gathered(lacking))):
        if lacking:
            log.info("%s comes from rank 0", name)
            for old in checkpoints.listed(folder):
                shutil.rmtree(old)
        _give_out(target, ranks, lacking=lacking)
    return target


def _is_same(checkpoint: Path, digest: str) -> bool:
    manifest = checkpoint / checkpoints.MANIFEST
    return manifest.is_file() and sha256(manifest) == digest and checkpoints.fault(checkpoint) is None


def _give_out(checkpoint: Path, ranks: Ranks, *, lacking: bool) -> None:
    """Send all files of rank 0's `checkpoint`, the manifest last; who is `lacking` writes them."""
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file()) if ranks.first else []
    found.sort(key=lambda path: path.name == checkpoints.MANIFEST)
    for name in ranks.told([str(path.relative_to(checkpoint)) for path in found]):
        target = checkpoint / name
        source = target.open("rb") if ranks.first else None
        if lacking:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
        while piece := ranks.told(source.read(PIECE_BYTES) if source else b""):
            if lacking:
                with target.open("ab") as stream:
                    stream.write(piece)
        if source:
            source.close()
    ranks.wait()
