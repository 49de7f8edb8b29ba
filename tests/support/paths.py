"""Where the repository's files lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
DATA = ROOT / "tests" / "data"
