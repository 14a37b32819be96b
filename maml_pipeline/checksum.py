"""SHA-256 checksums of ZIP archives, such as those of `torch.save` and `numpy.savez`."""

import hashlib
import io
import struct
import zipfile

MARK = b"sha256:"
NO_COMMENT = struct.pack("<H", 0)
COMMENT_BYTES = len(MARK) + 2 * hashlib.sha256().digest_size
COMMENT_LENGTH = struct.pack("<H", COMMENT_BYTES)


def add_checksum(archive: bytes) -> bytes:
    """Add the SHA-256 of an archive as its comment, which ZIP readers skip.

    `torch.load` checks nothing, and the CRC-32 of ZIP does not cover the headers.

    Args:
        archive: A complete archive without a comment; its last two bytes are the comment's length, 0.
    """
    assert archive.endswith(NO_COMMENT)
    body = archive.removesuffix(NO_COMMENT)
    return body + COMMENT_LENGTH + _comment(body)


def has_valid_checksum(archive: bytes) -> bool:
    """Tell whether an archive has the checksum of `add_checksum`, and it matches."""
    body = archive[: -COMMENT_BYTES - len(COMMENT_LENGTH)]
    return archive == body + COMMENT_LENGTH + _comment(body)


def has_valid_members(archive: bytes) -> bool:
    """Tell whether an archive of another program, without a comment, has intact members."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            return archive.endswith(NO_COMMENT) and not members.comment and members.testzip() is None
    except Exception:  # ZIP readers raise many kinds of errors on damaged headers
        return False


def _comment(body: bytes) -> bytes:
    return MARK + hashlib.sha256(body).hexdigest().encode()
