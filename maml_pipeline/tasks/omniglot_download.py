"""Find the Omniglot archives on disk, or download them."""

import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path

from maml_pipeline.environment import OFFLINE, OMNIGLOT_ROOT
from maml_pipeline.errors import UserError
from maml_pipeline.files import expand_home, make_folder, remove_new_folders_on_error

HALVES = ("images_background", "images_evaluation")


def find_or_download(root: Path | None = None) -> list[Path]:
    """Return the background and the evaluation half; download them if both are missing.

    Args:
        root: Data folder, as in `Omniglot`.

    Raises:
        UserError: One half is missing, or the download fails or is not allowed.
    """
    root = expand_home(root, "root") if root else expand_home(OMNIGLOT_ROOT.get(), OMNIGLOT_ROOT.name)
    return find_halves(root) or download_halves(root)


def find_halves(root: Path) -> list[Path] | None:
    """Return both halves below a folder, each a folder or a zip, or `None` if both are missing.

    Raises:
        UserError: Only one of them exists.
    """
    for folder in (root, root / "omniglot-py"):
        found = [_find_half(folder, half) for half in HALVES]
        halves = [path for path in found if path is not None]
        if len(halves) == len(HALVES):
            return halves
        if halves:
            missing = HALVES[found.index(None)]
            raise UserError(f"{folder} has {halves[0].name} but neither {missing} nor {missing}.zip")
    return None


def download_halves(root: Path) -> list[Path]:
    """Download both halves into a folder with torchvision, and return them.

    Raises:
        UserError: `MAML_OFFLINE` is set, the folder is not writable, or the download fails.
    """
    if OFFLINE.get():
        raise UserError(
            f"root {root} does not contain Omniglot, and Slurm jobs and runs with {OFFLINE.name} set "
            f"download nothing; run `maml prepare omniglot` first, or set {OMNIGLOT_ROOT.name} to its "
            "folder"
        )
    from torchvision.datasets import Omniglot  # here, because importing torchvision takes seconds

    with remove_new_folders_on_error(root):
        make_folder(root, "root")
        try:
            # Downloaded elsewhere and renamed, so that an incomplete download is never found.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as unfinished:
                for background in (True, False):
                    Omniglot(unfinished, background=background, download=True)
                if not find_halves(root):  # another process may have finished first
                    Path(unfinished, "omniglot-py").rename(root / "omniglot-py")
        except (OSError, RuntimeError, HTTPException, zipfile.BadZipFile) as error:
            raise UserError(
                f"root {root} does not contain Omniglot, and the download failed ({error}). Put "
                f"{HALVES[0]}.zip and {HALVES[1]}.zip there, or set {OMNIGLOT_ROOT.name} to their folder"
            ) from error
    return find_halves(root) or []


def _find_half(folder: Path, half: str) -> Path | None:
    unpacked, archive = folder / half, folder / f"{half}.zip"
    if unpacked.is_dir() and any(unpacked.iterdir()):
        # Some programs unpack into another folder of the same name.
        while (unpacked / half).is_dir():
            unpacked /= half
        return unpacked
    return archive if archive.exists() else None
