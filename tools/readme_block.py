"""Print the fenced block of README.md that follows an HTML comment: what the README tells people to type, CI types.

python tools/readme_block.py "ci: test command"
"""

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def block(text: str, mark: str) -> str:
    found = re.findall(rf"^<!-- {re.escape(mark)} -->\n\s*```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        raise SystemExit(f"README.md: {len(found)} fenced blocks right after <!-- {mark} -->, expected one")
    return str(found[0])


if __name__ == "__main__":
    print(block(README.read_text(encoding="utf-8"), sys.argv[1]), end="")
