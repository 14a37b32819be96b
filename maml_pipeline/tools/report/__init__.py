"""Report."""
from pathlib import Path
def write_report(runs, folder: Path) -> Path:
    return folder
