"""Write docs/claims.md."""

import sys
from pathlib import Path

from foretoken.analysis.claims.page import page

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
