"""Where an image comes from: a statement and a bill of materials attached to it, and its signatures.

What is known is read from the folder that is pushed (facts.py), stated in forms that others read
(statement.py: in-toto and SLSA, bom.py: CycloneDX), and written beside the image (attaching.py) or read from
there (attached.py). Does not know how images are stored (runtime/oci does). Start at attaching.py.
"""

from runtime.provenance.attached import Attached, attached
from runtime.provenance.attaching import attaching

__all__ = ["Attached", "attached", "attaching"]
