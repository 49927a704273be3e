"""Check the prose of the repository against a word list; `make lint` runs this.

Three groups of text are checked, and every finding is printed as file:line:

- docstrings and comments of gradrun/: the rates in `MAX_RATES`, per 1,000 words;
- these, messages (string literals of gradrun/), names of tests and comments of other files: the
  phrases in `DISCOURAGED`, which may not occur at all;
- Markdown pages: the same phrases, outside of code.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

MAX_RATES = {
    "what": (r"what", 2.0),
    "hold": (r"holds?|held", 1.0),
    "say": (r"says?|said", 1.0),
    "tell": (r"tells?|told", 0.5),
    "is no": (r"(?:is|are) no", 0.5),
}
"""Name -> (pattern, greatest number of matches per 1,000 words of docstrings and comments)."""

DISCOURAGED = {
    r"anew|once more": "again",
    r"as ever": "still",
    r"(?:is|are|was|were) (?:told|said)": "is reported",
    r"(?:told|tells?) (?:of|apart)": "report, distinguish",
    r"blame[sd]?": "report, attribute to",
    r"what becomes of": "name the result",
    r"(?:stands?|stood) (?:in|at|on|beside|below|above|by|there|alone)": "is in",
    r"(?:lies?|lay) (?:in|at|on|beside|below|above|beyond|there|behind)|wherein|thereof": "is in",
    r"(?:goes|go|went|gone|going) on": "continue, resume",
    r"to go on": "to resume",
    r"(?:from|where) it lies": "name the place",
    r"(?:sets?|setting|taken?|takes) apart": "quarantine, split",
    r"made safe|makes? safe": "commit",
    r"put(?:s|ting)? back": "restore",
    r"weigh(?:s|ed|ing)?": "measure",
    r"mend(?:s|ed|ing)?": "fix",
    r"shelf|shelves|the house|the laws": "package, architecture, principles",
    r"by turns|in turns": "interleaved, alternately",
    r"of like": "of similar",
    r"for ever": "forever",
    r"in vain": "without effect",
    r"whoever|whence|hence(?:forth)?|thence|hither|ere|nought|naught": "plain words",
    r"as such|no such thing": "drop it",
    r"truly|honest(?:ly)?": "say what is measured",
    r"knows (?:no|neither|nothing)|knows?;|neither knows": "drop it",
    r"ours|hers|theirs": "name the thing",
    r"is wanted|are wanted|is meant|are meant": "is required, is intended",
    r"(?:in|of|at) (?:a|an|the) \w+ of (?:its|their|his|her) own": "a separate ...",
    r"likeliest|leanest": "most likely, lowest memory",
    r"as (?:people|they) (?:write|know) them": "drop it",
    r"is asked(?: for)?|are asked(?: for)?": "is requested",
}
"""Pattern -> the plain word for it. Matched at word boundaries, in any case."""

MESSAGES_ONLY = {
    r"(?:is|are) no\b(?! longer)": "is not a ..., no ... exists",
    r"refuse[sd]?|refusal": "reject, fail on, cannot",
    r"holds?|held": "contains",
    r"says?|said|tells?|told|what": "name the thing",
}
"""More patterns for messages, where a user reads them without context."""

COMMENTED = ("configs/*.yaml", ".github/**/*.yml", "*.yml", ".*.yaml", "Makefile", "pyproject.toml")
SKIPPED = {".git", ".venv", "site", "dist", "build", "golden", "node_modules", "runs"}


class Text(NamedTuple):
    """A piece of prose, and where it starts."""

    path: Path
    line: int
    text: str

    def find(self, pattern: str) -> Iterator[tuple[int, str]]:
        """Yield line and text of each match of a pattern between word boundaries."""
        words = rf"\b(?:{pattern})\b".replace(" ", r"\s+")
        for match in re.finditer(words, self.text, re.IGNORECASE):
            yield self.line + self.text.count("\n", 0, match.start()), " ".join(match[0].split())


def docstrings_and_comments(path: Path) -> Iterator[Text]:
    """Yield the docstrings and the comments of a Python file; comments on adjacent lines as one."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield Text(path, node.lineno, text)
    comment, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if comment and line != last + 1:
                yield Text(path, last - comment.count("\n"), comment)
                comment = ""
            comment, last = f"{comment}\n{token.string[1:]}" if comment else token.string[1:], line
    if comment:
        yield Text(path, last - comment.count("\n"), comment)


def messages(path: Path) -> Iterator[Text]:
    """Yield the string literals of a Python file that are sentences, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped.update(map(id, node.values))
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if id(node) not in skipped and " " in text.strip():
            yield Text(path, node.lineno, text)


def test_names(path: Path) -> Iterator[Text]:
    """Yield the names of test functions as sentences."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield Text(path, node.lineno, node.name.replace("_", " "))


def markdown(path: Path) -> Text:
    """Return a Markdown page with its code replaced by blank lines."""
    text = path.read_text(encoding="utf-8")
    code = re.compile(r"^( *)(```|~~~).*?^\1\2|`[^`\n]*`|<!--.*?-->", re.MULTILINE | re.DOTALL)
    return Text(path, 1, code.sub(lambda match: "\n" * match[0].count("\n"), text))


def hash_comments(path: Path) -> Iterator[Text]:
    """Yield the `#` comments of a YAML, TOML or Makefile."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if comment := re.search(r"(?:^|\s)##? .*", line):
            yield Text(path, number, comment[0])


def files(root: Path, pattern: str) -> list[Path]:
    """Return the matching files of the repository, without generated ones."""
    paths = (path for path in root.glob(pattern) if path.is_file())
    return sorted(path for path in paths if not SKIPPED & {*path.relative_to(root).parts})


def excessive_rates(root: Path, texts: list[Text]) -> Iterator[str]:
    """Yield a line for each of `MAX_RATES` that the texts together exceed."""
    total = sum(len(re.findall(r"[A-Za-z']+", text.text)) for text in texts)
    for name, (pattern, allowed) in MAX_RATES.items():
        uses = [
            (text.path.relative_to(root), line) for text in texts for line, _ in text.find(pattern)
        ]
        rate = 1000 * len(uses) / max(total, 1)
        if rate > allowed:
            first = " ".join(f"{path}:{line}" for path, line in uses[:20])
            yield f"{name!r}: {rate:.1f} per 1,000 words, at most {allowed} allowed: {first}"


def check(root: Path) -> list[str]:
    """Check a repository.

    Returns:
        One line for each finding, empty if there are none.
    """
    sources = files(root, "gradrun/**/*.py")
    documented = [text for path in sources for text in docstrings_and_comments(path)]
    shown = [text for path in sources for text in messages(path)]
    others = [markdown(path) for path in files(root, "**/*.md")]
    for pattern in ("tests/**/*.py", "models/*.py", "benchmarks/*.py"):
        for path in files(root, pattern):
            others += [*docstrings_and_comments(path), *test_names(path)]
    for pattern in COMMENTED:
        for path in files(root, pattern):
            others += hash_comments(path)
    findings = {
        f"{text.path.relative_to(root)}:{line}: {words!r}; use: {plain}"
        for texts, patterns in (
            (documented + shown + others, DISCOURAGED),
            (shown, MESSAGES_ONLY),
        )
        for text in texts
        for pattern, plain in patterns.items()
        for line, words in text.find(pattern)
    }
    return [*excessive_rates(root, documented), *sorted(findings)]


def main() -> int:
    """Print the findings; exit code 1 if there are any."""
    findings = check(ROOT)
    for finding in findings:
        print(finding)
    if findings:
        print(f"{len(findings)} findings in the prose; CONTRIBUTING.md describes the style")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
