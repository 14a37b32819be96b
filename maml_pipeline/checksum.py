"""ZIP archives, such as `torch.save` and `numpy.savez` write, with a checksum of the whole file."""

import hashlib
import io
import struct
import zipfile

MARK = b"sha256:"
NO_COMMENT = struct.pack("<H", 0)
COMMENT_BYTES = len(MARK) + 2 * hashlib.sha256().digest_size
COMMENT_LENGTH = struct.pack("<H", COMMENT_BYTES)


def add_checksum(archive: bytes) -> bytes:
    """Return the archive with its SHA-256 in its comment, which every reader of ZIP files skips.

    Neither `torch.load` nor a ZIP reader's CRC-32, where it is checked at all, covers the headers.

    Args:
        archive: A whole archive without a comment: its last two bytes are the comment's length, 0.
    """
    assert archive.endswith(NO_COMMENT)
    body = archive.removesuffix(NO_COMMENT)
    return body + COMMENT_LENGTH + _comment(body)


def has_valid_checksum(archive: bytes) -> bool:
    """Tell whether `add_checksum` returned this archive, and no bit of it has changed since."""
    body = archive[: -COMMENT_BYTES - len(COMMENT_LENGTH)]
    return archive == body + COMMENT_LENGTH + _comment(body)


def has_valid_members(archive: bytes) -> bool:
    """Tell whether this is an archive without a comment, as other programs write, with whole members."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            return archive.endswith(NO_COMMENT) and not members.comment and members.testzip() is None
    except Exception:  # what a ZIP reader raises on damaged headers is of many kinds
        return False


def _comment(body: bytes) -> bytes:
    return MARK + hashlib.sha256(body).hexdigest().encode()
